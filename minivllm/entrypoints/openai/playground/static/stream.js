// How the page speaks to the server: JSON out, server-sent events in, errors as the server words them.
// No DOM here, so that it can be tested without a browser.

/** What went wrong, in the server's words. status: 0 when there was no answer at all. */
export class ServerError extends Error {
  constructor(status, message, param = null) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

/** The error in a body: `{"error": {"message", "param", "code"}}`, or whatever text there is. */
export function readError(status, text) {
  try {
    const { error } = JSON.parse(text);
    if (typeof error.message === "string") return new ServerError(error.code || status, error.message, error.param);
  } catch {
    // not JSON: a proxy's words, perhaps
  }
  return new ServerError(status, text.trim().slice(0, 500) || `the server answered ${status} and said nothing`);
}

/** Cuts a stream of text into events, wherever its pieces were cut. Comments are dropped. */
export class EventParser {
  #rest = "";

  /** The events that this piece completes: [{name, data}]. */
  push(piece) {
    const blocks = (this.#rest + piece).split(/\r?\n\r?\n/);
    this.#rest = blocks.pop();
    return blocks.map(readEvent).filter((event) => event.data !== null);
  }
}

function readEvent(block) {
  let name = "message";
  const data = [];
  for (const line of block.split(/\r?\n/)) {
    if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
    else if (line.startsWith("event:")) name = line.slice(6).trim();
  }
  return { name, data: data.length ? data.join("\n") : null };
}

/** The JSON of each event of a response, to [DONE] or the end of it. Throws ServerError for an error event. */
export async function* readEvents(response) {
  const parser = new EventParser();
  const decoder = new TextDecoder();
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      for (const { data } of parser.push(decoder.decode(value, { stream: true }))) {
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw readError(0, data);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading early closes the connection, and the server aborts
  }
}

/** Calls of one server, relative to the page, so that a path prefix of a proxy stays in front. */
export class Server {
  /** key(): the key to send, or "". onRefused(words): a call was refused for want of one. */
  constructor(base, key, onRefused) {
    this.base = base;
    this.key = key;
    this.onRefused = onRefused;
  }

  /** The response, if it is a good one. Throws ServerError, or AbortError when `signal` stopped it. */
  async call(path, { body, signal } = {}) {
    const headers = {};
    if (this.key()) headers.Authorization = `Bearer ${this.key()}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(new URL(path, this.base), {
        method: body === undefined ? "GET" : "POST",
        headers,
        body: body === undefined ? undefined : JSON.stringify(body),
        signal,
        cache: "no-store",
        credentials: "same-origin",
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ServerError(0, `the server cannot be reached (${error.message})`);
    }
    if (response.ok) return response;
    const error = readError(response.status, await response.text());
    if (response.status === 401) this.onRefused(error.message);
    throw error;
  }
}
