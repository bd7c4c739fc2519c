// The panel: the words of the last exchanges as the GPU worker recorded them, beside those that split would have sent.

import { ApiError, get } from "./api.js";
import { histogram } from "./histogram.js";

const SOONEST_MS = 1000; // between two looks while an answer streams
const RESTS = 10; // times as long as a look took: it costs the gateway work
const NOTHING = "Nothing yet. Ask something: the numbers that the GPU worker gets appear here, beside those that it would get without masks.";
const READ = "Read with the public model, token by token";

const note = document.getElementById("panel-note");
const body = document.getElementById("panel-body");

export class Panel {
  constructor() {
    this.timer = 0;
    this.absent = false; // there is no recording, and there will be none
  }

  /** Look again and again while an answer streams, and once when it is through. */
  follow(streaming) {
    clearTimeout(this.timer);
    if (this.absent) return;
    const again = async () => {
      const started = performance.now();
      await this.refresh();
      const rest = Math.max(SOONEST_MS, RESTS * (performance.now() - started));
      if (streaming && !this.absent) this.timer = setTimeout(again, rest);
    };
    this.timer = setTimeout(again, streaming ? SOONEST_MS / 2 : 0);
  }

  async refresh() {
    try {
      show(await get("v1/exposure"));
    } catch (error) {
      this.absent = error instanceof ApiError && error.status === 404;
      body.hidden = true;
      say(this.absent ? error.message : "The gateway does not answer: is it still running?");
    }
  }
}

function show(exposure) {
  const { recorded, computed } = exposure;
  body.hidden = recorded === null;
  if (recorded === null) {
    say(exposure.why ?? NOTHING);
    return;
  }
  const rows = recorded.rows === 1 ? "The last token's row" : `The last ${recorded.rows} tokens' rows`;
  say(`${rows} as they entered layer 0: ${recorded.words.toLocaleString("en")} words of 32 bits.`);
  const masked = exposure.scheme === "secure-infer";
  const first = document.getElementById("recorded");
  first.querySelector("h3").textContent = `${exposure.scheme}: what was sent`;
  first.querySelector(".says").textContent = masked ? `${READ}: nonsense, and other nonsense next time.` : `${READ}:`;
  view(first, recorded);
  const other = document.getElementById("computed");
  other.hidden = computed === null;
  if (computed) view(other, computed);
  document.getElementById("exchanges").replaceChildren(...exposure.exchanges.map(line));
}

/** Only what is new: it is read out. */
function say(text) {
  if (note.textContent !== text) note.textContent = text;
}

function view(article, words) {
  article.querySelector(".histogram").replaceChildren(histogram(words.top_bytes));
  article.querySelector(".words").textContent = words.first.join(" ");
  article.querySelector(".reading").textContent = words.reading.join("").trim();
}

function line(exchange) {
  const row = document.createElement("tr");
  const cells = [exchange.product, exchange.rows, size(exchange.bytes_up), size(exchange.bytes_down), exchange.first.join(" ")];
  for (const text of cells) row.insertCell().textContent = text;
  return row;
}

function size(bytes) {
  return bytes < 1024 ? `${bytes} B` : bytes < 1 << 20 ? `${(bytes / 1024).toFixed(1)} KiB` : `${(bytes / (1 << 20)).toFixed(1)} MiB`;
}
