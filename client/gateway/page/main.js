// Puts the page together: keys and buttons, the badge, the panel.

import { get } from "./api.js";
import { watch } from "./badge.js";
import { Chat } from "./chat.js";
import { Panel } from "./panel.js";

const message = document.getElementById("message");
const composer = document.getElementById("composer");
const send = document.getElementById("send");
const stop = document.getElementById("stop");

const panel = new Panel();
const chat = new Chat("", (streaming) => {
  stop.hidden = !streaming;
  send.hidden = streaming;
  panel.follow(streaming);
});

async function submit(text) {
  if (!text.trim() || chat.streaming || !chat.model) return;
  message.value = "";
  fit();
  const unsent = await chat.ask(text);
  if (unsent && !message.value) message.value = unsent;
  fit();
}

function fit() {
  message.rows = Math.min(8, message.value.split("\n").length); // CSS grows it by its content where it can
}

/** The model's name, once the trusted worker is verified. */
async function onReport(report) {
  send.disabled = !report.ready;
  if (!report.ready || chat.model) return;
  try {
    chat.model = (await get("v1/models")).data[0].id;
  } catch {
    return; // lost again meanwhile: the next report tells
  }
  document.getElementById("model").textContent = chat.model;
}

composer.addEventListener("submit", (event) => {
  event.preventDefault();
  submit(message.value);
});
message.addEventListener("input", fit);
message.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit(message.value);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) chat.stop();
});
stop.addEventListener("click", () => {
  chat.stop();
  message.focus();
});
document.getElementById("new").addEventListener("click", () => {
  chat.reset();
  message.focus();
});
document.getElementById("suggestions").addEventListener("click", (event) => {
  if (event.target instanceof HTMLButtonElement) submit(event.target.textContent);
});

watch(onReport);
panel.refresh();
message.focus();
