// The badge: who was verified and how, as /v1/attestation/report says it now; its steps on demand.

import { get } from "./api.js";

const PERIOD_MS = 10000;
const SOON_MS = 1500; // while nothing is verified

const badge = document.getElementById("badge");
const dialog = document.getElementById("verdict");
const WORDS = {
  simulated: ["Simulated TEE: no privacy from this machine", "This evidence proves nothing about any hardware: whoever runs the trusted worker's machine can read the conversation. Good for trying Cleave out, for nothing else."],
  verified: ["Verified hardware", "The trusted worker proved that it runs in a confidential virtual machine, and every step of the policy accepts it. Prompts are sealed for the key in this evidence."],
  refused: ["Refused: nothing is sent", "The evidence does not meet the policy. No prompt leaves this machine."],
  none: ["Not verified: nothing is sent", "There is no evidence to judge. No prompt leaves this machine."],
  pending: ["Verifying the trusted worker", "Nothing is sent before the verdict."],
};

let report = null;
let fetched = 0;
let timer = 0;

/** Keep the badge true. `onReport` gets every report. */
export function watch(onReport) {
  const look = async () => {
    clearTimeout(timer);
    if (!document.hidden || !report) {
      report = await fetchReport();
      fetched = performance.now();
      show();
      onReport(report);
    }
    clearTimeout(timer);
    timer = setTimeout(look, report.ready ? PERIOD_MS : SOON_MS);
  };
  badge.addEventListener("click", open);
  setInterval(() => report && showDetails(), 1000);
  document.addEventListener("visibilitychange", look);
  return look();
}

async function fetchReport() {
  try {
    return await get("v1/attestation/report");
  } catch {
    return { verdict: "none", ready: false, message: "The gateway does not answer: is it still running?", steps: [] };
  }
}

function state() {
  if (report.verdict !== "accepted") return report.verdict in WORDS ? report.verdict : "none";
  return report.verified ? "verified" : "simulated";
}

function show() {
  badge.dataset.state = state();
  document.getElementById("badge-verdict").textContent = WORDS[state()][0];
  showDetails();
}

function showDetails() {
  document.getElementById("badge-details").textContent = facts().map(([name, value, short]) => short ?? `${name} ${value}`)
    .slice(0, 4).join(" · ");
}

/** [name, value, what the badge says]. */
function facts() {
  const step = report.failed_step;
  const found = [];
  if (step) found.push(["failed step", `${step.number ?? ""} ${step.field}`.trim()]);
  if (report.provider) found.push(["provider", report.provider, report.provider]);
  if (report.scheme) found.push(["scheme", `${report.scheme}, ${report.precision}`, report.scheme]);
  if (report.evidence_age_seconds !== undefined) {
    const seconds = report.evidence_age_seconds + (performance.now() - fetched) / 1000;
    found.push(["evidence", `${age(seconds)} old`]);
  }
  if (report.policy_sha256) found.push(["policy", `SHA-256 ${report.policy_sha256}`, `policy ${report.policy_sha256.slice(0, 8)}`]);
  if (report.target) found.push(["trusted worker", report.target]);
  return found;
}

function age(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function open() {
  if (!report) return;
  dialog.dataset.state = state();
  document.getElementById("verdict-words").textContent = WORDS[state()][1];
  document.getElementById("verdict-facts").replaceChildren(
    ...facts().flatMap(([name, value]) => [element("dt", name), element("dd", value)]));
  document.getElementById("verdict-steps").replaceChildren(...report.steps.map(line));
  document.getElementById("verdict-advice").textContent = [report.message, report.advice].filter(Boolean).join(" ");
  dialog.showModal();
}

function line(step) {
  const item = element("li", "");
  item.className = step.verdict.replace(" ", "-");
  item.value = step.number;
  item.append(element("b", step.field), element("i", step.verdict), element("span", step.text));
  return item;
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}
