// The two ways to ask: a conversation, and a prompt to complete. What the model says is only ever set as text.

import { readEvents } from "./stream.js";

const byId = (id) => document.getElementById(id);

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

/** A request that can be stopped, and a line about how it went. */
class Ask {
  constructor(server, path, body) {
    this.server = server;
    this.path = path;
    this.body = { ...body, stream: true, stream_options: { include_usage: true } };
    this.stopper = new AbortController();
    this.stopped = false;
    this.finishReason = null;
    this.usage = null;
    this.numChunks = 0;
    this.firstAt = null;
  }

  stop() {
    this.stopped = true;
    this.stopper.abort();
  }

  /** The choices of each chunk as they come. Throws ServerError. A stop just ends them. */
  async *choices() {
    this.startedAt = performance.now();
    try {
      const response = await this.server.call(this.path, { body: this.body, signal: this.stopper.signal });
      for await (const chunk of readEvents(response)) {
        this.numChunks++;
        if (chunk.usage) this.usage = chunk.usage;
        for (const choice of chunk.choices ?? []) {
          this.firstAt ??= performance.now();
          this.finishReason = choice.finish_reason ?? this.finishReason;
          yield choice;
        }
      }
    } catch (error) {
      if (error.name !== "AbortError") throw error;
    } finally {
      this.endedAt = performance.now();
    }
  }

  /** "120 tokens · 840 tokens/s · first after 12 ms · stop" */
  about() {
    const parts = [];
    if (this.usage) {
      const count = this.usage.completion_tokens;
      parts.push(`${count} token${count === 1 ? "" : "s"}`);
      const seconds = (this.endedAt - (this.firstAt ?? this.startedAt)) / 1000;
      // An answer that came in one piece, as to a page that was held up, took no time that could be told.
      if (this.numChunks > 2 && seconds > 0.01) parts.push(`${Math.round((count - 1) / seconds).toLocaleString("en")} tokens/s`);
    }
    if (this.firstAt) parts.push(`first after ${Math.round(this.firstAt - this.startedAt)} ms`);
    parts.push(this.stopped ? "stopped by you" : this.finishReason === "length" ? "cut at max tokens" : (this.finishReason ?? "no end"));
    return parts.join(" · ");
  }
}

/** What went wrong, in the server's own words. */
function problem(error) {
  const box = element("div", "problem");
  box.setAttribute("role", "alert");
  if (error.status) box.append(element("b", "", `${error.status} `));
  box.append(error.message);
  return box;
}

/** Keeps the end in view while text grows, unless the reader has scrolled away from it. */
function follow(box) {
  let asked = false;
  return () => {
    if (asked || box.scrollHeight - box.scrollTop - box.clientHeight > 80) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      box.scrollTop = box.scrollHeight;
    });
  };
}

/** What both have: buttons that start and stop, one request at a time, and a word when it is over. */
class Asker {
  constructor({ server, knobs, model, send, stop }) {
    Object.assign(this, { server, knobs, model, send, stopButton: stop });
    this.ask = null;
    stop.addEventListener("click", () => this.ask?.stop());
  }

  begin(path, body) {
    this.ask = new Ask(this.server, path, { model: this.model() || undefined, ...body, ...this.knobs.params() });
    const hadFocus = document.activeElement === this.send;
    this.send.hidden = true;
    this.stopButton.hidden = false;
    if (hadFocus) this.stopButton.focus();
    return this.ask;
  }

  end(words) {
    const hadFocus = document.activeElement === this.stopButton;
    this.ask = null;
    this.send.hidden = false;
    this.stopButton.hidden = true;
    if (hadFocus) this.send.focus();
    byId("spoken").textContent = words;
  }
}

export class Chat extends Asker {
  constructor(parts) {
    super({ ...parts, send: byId("chat-send"), stop: byId("chat-stop") });
    this.log = byId("log");
    this.welcome = byId("welcome");
    this.input = byId("chat-input");
    this.messages = [];
    this.follow = follow(this.log);
    byId("chat-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.say(this.input.value);
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.say(this.input.value);
    });
    byId("chat-clear").addEventListener("click", () => this.clear());
  }

  clear() {
    this.ask?.stop();
    this.messages = [];
    this.log.replaceChildren(this.welcome);
    this.input.focus();
  }

  async say(text) {
    if (this.ask || !text.trim()) return;
    const question = { role: "user", content: text };
    const system = this.knobs.system ? [{ role: "system", content: this.knobs.system }] : [];
    const messages = this.messages; // a new conversation may begin before this answer ends
    let ask;
    try {
      ask = this.begin("v1/chat/completions", { messages: [...system, ...messages, question] });
    } catch (error) {
      this.log.append(problem(error)); // a knob holds no number
      return;
    }
    this.input.value = "";
    this.welcome.remove();
    this.#bubble("You", "user").append(element("div", "text", text));
    const answer = this.#bubble(this.model() || "Answer", "assistant");
    const said = element("div", "text");
    answer.append(said);
    answer.classList.add("busy");
    this.log.scrollTop = this.log.scrollHeight;
    let words = "";
    try {
      let thought = null;
      for await (const { delta } of ask.choices()) {
        const reasoning = delta.reasoning ?? delta.reasoning_content;
        if (reasoning) (thought ??= this.#thought(answer, said)).append(reasoning);
        if (delta.content) said.append(delta.content);
        this.follow();
      }
      messages.push(question, { role: "assistant", content: said.textContent });
      answer.append(element("p", "about", ask.about()));
      words = `Answer: ${said.textContent}`;
    } catch (error) {
      if (said.textContent) messages.push(question, { role: "assistant", content: said.textContent });
      else if (!this.input.value) this.input.value = text; // to be sent again
      answer.append(problem(error));
    } finally {
      answer.classList.remove("busy");
      this.follow();
      this.end(words);
    }
  }

  #bubble(name, kind) {
    const box = element("article", `message ${kind}`);
    box.append(element("h2", kind === "user" ? "unseen" : "", name));
    this.log.append(box);
    return box;
  }

  #thought(answer, before) {
    const details = element("details", "reasoning");
    details.open = true;
    const text = element("div", "text");
    details.append(element("summary", "", "Reasoning"), text);
    answer.insertBefore(details, before);
    return text;
  }
}

export class Completion extends Asker {
  constructor(parts) {
    super({ ...parts, send: byId("completion-send"), stop: byId("completion-stop") });
    this.input = byId("completion-input");
    this.output = byId("completion-output");
    this.more = byId("completion-more");
    this.follow = follow(this.output);
    byId("completion-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.complete();
    });
    this.input.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.complete();
    });
    this.more.addEventListener("click", () => {
      this.input.value = this.whole;
      this.input.focus();
    });
  }

  async complete() {
    if (this.ask) return;
    const prompt = this.input.value;
    this.output.replaceChildren();
    let ask;
    try {
      ask = this.begin("v1/completions", { prompt });
    } catch (error) {
      this.output.append(problem(error));
      return;
    }
    const made = element("span", "made");
    this.output.append(element("span", "given", prompt), made);
    this.more.disabled = true;
    let words = "";
    try {
      for await (const { text } of ask.choices()) {
        if (text) made.append(text);
        this.follow();
      }
      this.output.append(element("p", "about", ask.about()));
      words = `Completion: ${made.textContent}`;
    } catch (error) {
      this.output.append(problem(error));
    } finally {
      this.follow();
      this.whole = prompt + made.textContent;
      this.more.disabled = !made.textContent;
      this.end(words);
    }
  }
}
