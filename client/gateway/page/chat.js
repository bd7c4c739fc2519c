// The conversation: what was said, the answer that streams in, and how to stop it.

import { stream } from "./api.js";

const NEAR_END = 80; // pixels below the edge within which the log still follows the answer
const RATE_MS = 250; // between two looks at the rate
const CURSOR = "streaming";

const log = document.getElementById("log");
const welcome = document.getElementById("welcome");
const rate = document.getElementById("rate");
const spoken = document.getElementById("spoken");
const composer = document.getElementById("composer");

export class Chat {
  /** `onChange(streaming)` is called when an answer begins and when it ends. */
  constructor(model, onChange) {
    this.model = model;
    this.onChange = onChange;
    this.messages = [];
    this.abort = null;
  }

  get streaming() {
    return this.abort !== null;
  }

  /** Ask, and stream the answer. Returns the text that could not be sent, else "". */
  async ask(text) {
    this.abort = new AbortController();
    const { signal } = this.abort;
    const history = this.messages; // of this chat: a new one may begin meanwhile
    welcome.remove();
    const question = turn("user", "You", text);
    const answer = turn("assistant", "Model", "");
    answer.classList.add(CURSOR);
    log.setAttribute("aria-busy", "true");
    this.onChange(true);
    const progress = new Progress(answer);
    let failure = null;
    try {
      const messages = [...history, { role: "user", content: text }];
      for await (const chunk of stream({ model: this.model, messages }, signal)) progress.add(chunk);
    } catch (error) {
      failure = signal.aborted ? null : error;
    }
    answer.classList.remove(CURSOR);
    progress.end(signal.aborted, failure);
    if (progress.text) {
      history.push({ role: "user", content: text }, { role: "assistant", content: progress.text });
    }
    if (log.contains(answer)) log.setAttribute("aria-busy", "false");
    if (this.abort?.signal === signal) this.abort = null;
    this.onChange(this.streaming);
    if (progress.text || !failure) return "";
    question.classList.add("unsent");
    return text;
  }

  stop() {
    this.abort?.abort();
  }

  /** Forget everything. */
  reset() {
    this.stop();
    this.messages = [];
    log.replaceChildren(welcome);
    rate.textContent = "";
    spoken.textContent = "A new chat.";
  }
}

/** One answer while it comes in: its text, its speed, and what became of it. */
class Progress {
  constructor(element) {
    this.element = element;
    this.text = "";
    this.pieces = 0;
    this.first = this.shown = this.last = 0;
    this.usage = this.cleave = null;
    this.reason = "";
  }

  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    this.cleave = chunk.cleave ?? this.cleave;
    const choice = chunk.choices[0];
    this.reason = choice?.finish_reason ?? this.reason;
    const piece = choice?.delta?.content;
    if (!piece) return;
    this.last = performance.now();
    this.first ||= this.last;
    this.pieces += 1;
    this.text += piece;
    follow(() => this.element.querySelector(".text").append(piece)); // a text node, whatever is in it
    if (this.last - this.shown > RATE_MS && this.pieces > 2) this.show(this.pieces);
  }

  show(tokens) {
    this.shown = performance.now();
    const seconds = (this.last - this.first) / 1000;
    if (tokens > 1 && seconds > 0) rate.textContent = `${((tokens - 1) / seconds).toFixed(1)} tokens/s`;
  }

  end(stopped, failure) {
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    this.show(tokens);
    const facts = [`${tokens} tokens`, rate.textContent];
    if (this.cleave?.products_verified) facts.push(`${this.cleave.products_verified.toLocaleString("en")} products verified`);
    if (stopped) facts.push("stopped");
    if (this.reason === "length") facts.push("the context is full");
    const words = failure ? why(failure) : facts.filter(Boolean).join(" · ");
    const note = this.element.querySelector(".note");
    note.classList.toggle("failed", failure !== null);
    if (failure) note.setAttribute("role", "alert");
    follow(() => { note.textContent = words; });
    spoken.textContent = failure ? "" : stopped ? "Stopped." : "The answer is complete.";
    rate.textContent = "";
  }
}

/** What the gateway said, or that it said nothing: browsers throw TypeError then. */
function why(failure) {
  return failure instanceof TypeError ? "The gateway does not answer: is it still running?" : failure.message;
}

function turn(kind, who, text) {
  const article = document.createElement("article");
  article.className = kind;
  article.append(part("h3", "who", who), part("p", "text", text), part("p", "note", ""));
  follow(() => log.append(article), true);
  return article;
}

function part(name, kind, text) {
  const element = document.createElement(name);
  element.className = kind;
  element.textContent = text;
  return element;
}

/** Make a change; if the end of the log was in view, it still is afterwards. A phone scrolls the page, not the log. */
function follow(change, always = false) {
  const edge = composer.getBoundingClientRect().top;
  const end = log.lastElementChild?.getBoundingClientRect().bottom ?? 0;
  const near = edge > 0 && edge < innerHeight && end < edge + NEAR_END;
  change();
  if (near || always) log.lastElementChild.scrollIntoView({ block: "end" });
}
