// The live view: reads playground/state while it is seen, and shows it.

import { colourOf, drawBars, drawLines, drawMap } from "./draw.js";
import { Meter, countBlocks, mapSquares, niceTop, readBlocks, show } from "./meter.js";
import { readEvents } from "./stream.js";

const MAP_HEIGHTS = [120, 320]; // pixels, for all engines together: at least, at most
const BELOW_MAP = 48; // its caption, and the panel's padding
const RETRY_MS = [500, 1000, 2000, 5000];
const STATES = ["free", "cached", "in use", "shared"];
const SPEAK_EVERY_MS = 4000; // how often a canvas's description may change under a screen reader

const byId = (id) => document.getElementById(id);
const setText = (id, text) => {
  const element = byId(id);
  if (element.textContent !== text) element.textContent = text;
};

export class EngineView {
  #meter = new Meter();
  #event = null; // the last reading
  #maps = []; // its blocks, of each engine
  #watching = null; // the AbortController of what is being read
  #paused = false;
  #spokenAt = 0;
  #drawn = 0;

  constructor(server) {
    this.server = server;
    this.panel = byId("panel-engine");
    byId("watch").addEventListener("click", () => this.#togglePause());
    document.addEventListener("visibilitychange", () => this.look());
    new ResizeObserver(() => this.draw()).observe(this.panel);
  }

  /** Watch if somebody can see it, else do not: to be called when that may have changed. */
  look() {
    const seen = !this.#paused && !this.panel.hidden && document.visibilityState === "visible";
    if (seen && !this.#watching) {
      this.#watching = new AbortController();
      this.#watch(this.#watching.signal);
    } else if (!seen && this.#watching) {
      this.#watching.abort();
      this.#watching = null;
      this.#say(this.#paused ? "paused" : "", "");
    }
  }

  /** Try again at once, as with a new key. */
  restart() {
    this.#watching?.abort();
    this.#watching = null;
    this.look();
  }

  #togglePause() {
    this.#paused = !this.#paused;
    byId("watch").textContent = this.#paused ? "Go on" : "Pause";
    this.look();
  }

  #say(words, state) {
    setText("watch-state", words);
    byId("watch-state").className = `quiet ${state}`;
  }

  async #watch(signal) {
    for (let failures = 0; !signal.aborted; ) {
      try {
        const response = await this.server.call("playground/state", { signal });
        for await (const event of readEvents(response)) {
          if (signal.aborted) return;
          failures = 0;
          this.#say("live", "live");
          this.#show(event);
        }
        throw new Error("the server has closed the view");
      } catch (error) {
        if (signal.aborted) return;
        this.#say(error.message, "lost");
        if (error.status === 401) return void (this.#watching = null); // the key dialog goes on from here
      }
      const wait = RETRY_MS[Math.min(failures++, RETRY_MS.length - 1)];
      await new Promise((resolve) => {
        setTimeout(resolve, wait);
        signal.addEventListener("abort", resolve, { once: true });
      });
    }
  }

  #show(event) {
    this.#event = event;
    this.#maps = event.engines.map((engine) => readBlocks(engine.blocks));
    const now = this.#meter.push(event);
    const hits = this.#meter.hitRate();
    setText("n-generated", show(this.#meter.rate("generated"), 1));
    setText("n-prompt", show(this.#meter.rate("prompts"), 1));
    setText("n-running", show(now.running));
    setText("n-waiting", show(now.waiting));
    setText("n-hits", hits.share === null ? "–" : `${Math.round(100 * hits.share)} %`);
    setText("n-hits-of", hits.share === null ? "no prompts yet" : hits.recent ? "last minute" : "since the start");
    setText("n-usage", `${show(100 * now.usage, 1)} %`);
    const numBlocks = event.engines.reduce((sum, engine) => sum + engine.num_blocks, 0);
    setText("n-usage-of", `of ${show(numBlocks)} blocks`);
    const counts = this.#maps.map((states, i) => countBlocks(states, event.engines[i].num_blocks));
    STATES.forEach((_, state) => setText(`n-block${state}`, show(counts.reduce((sum, each) => sum + each[state], 0))));
    cancelAnimationFrame(this.#drawn);
    this.#drawn = requestAnimationFrame(() => this.draw());
  }

  draw() {
    if (!this.#event || this.panel.hidden) return;
    const series = this.#meter.series();
    const column = (name) => series.map((bucket) => (bucket ? bucket[name] : null));
    const [running, waiting] = [column("running"), column("waiting")];
    const most = Math.max(...running.map((value, i) => (value ?? 0) + (waiting[i] ?? 0)));
    const part = (values, swatch) => ({ values, colour: colourOf(`.swatch.${swatch}`) });
    drawBars(byId("requests"), [part(running, "running"), part(waiting, "waiting")], niceTop(most, 4));
    const [generated, prompts] = [column("generated"), column("prompts")];
    const fastest = Math.max(...generated, ...prompts);
    drawLines(byId("tokens"), [part(prompts, "prompt"), part(generated, "generated")], niceTop(fastest, 10));
    this.#drawMaps(this.#event.engines);
    this.#describe();
  }

  #drawMaps(engines) {
    const maps = byId("maps");
    while (maps.children.length > engines.length) maps.lastChild.remove();
    while (maps.children.length < engines.length) {
      const canvas = document.createElement("canvas");
      canvas.className = "map";
      canvas.setAttribute("role", "img");
      maps.append(canvas);
    }
    const colours = STATES.map((_, state) => colourOf(`.swatch.block${state}`));
    const room = this.panel.clientHeight - maps.offsetTop - BELOW_MAP;
    const height = Math.min(Math.max(room, MAP_HEIGHTS[0]), MAP_HEIGHTS[1]) / engines.length;
    const drawn = this.#maps.map((states) => mapSquares(states, maps.clientWidth, height));
    drawn.forEach((map, i) => drawMap(maps.children[i], map, colours));
    const each = drawn[0].each * engines[0].block_stride;
    const square = each > 1 ? `A square is ${each} blocks, as the busiest of them is` : "A square is a block";
    setText("maps-caption", `${square}; a block is ${this.#event.block_size} tokens.`);
  }

  /** The pictures in words, not so often that nobody could listen to them. */
  #describe() {
    const now = Date.now();
    if (now - this.#spokenAt < SPEAK_EVERY_MS) return;
    this.#spokenAt = now;
    const { running, waiting } = this.#meter.last;
    byId("requests").setAttribute("aria-label", `Requests over the last minute; now ${running} running, ${waiting} waiting`);
    const rate = show(this.#meter.rate("generated"), 1);
    byId("tokens").setAttribute("aria-label", `Tokens per second over the last minute; now ${rate} generated`);
    [...byId("maps").children].forEach((canvas, i) => {
      const counts = countBlocks(this.#maps[i], this.#event.engines[i].num_blocks);
      const words = STATES.map((state, j) => `${counts[j]} ${state}`).join(", ");
      canvas.setAttribute("aria-label", `Blocks${i ? ` of engine ${i}` : ""}: ${words}`);
    });
  }
}
