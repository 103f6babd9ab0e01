// Makes what the live view shows of the readings that come: buckets over the last minute, and rates. No DOM.

export const WINDOW_S = 60;
export const BUCKET_S = 0.5;
const RATE_S = 2; // a rate is that of the last seconds
const GAP_S = 5; // readings further apart say nothing of the time between them

/** A reading of several engines as one. */
export function sumEngines(event) {
  const sum = (name) => event.engines.reduce((total, engine) => total + engine[name], 0);
  const numBlocks = sum("num_blocks");
  return {
    time: event.time,
    running: sum("num_running_reqs"),
    waiting: sum("num_waiting_reqs"),
    generated: sum("num_generation_tokens"),
    prompts: sum("num_prompt_tokens"),
    cached: sum("num_cached_tokens"),
    usage: numBlocks ? event.engines.reduce((u, e) => u + e.kv_cache_usage * e.num_blocks, 0) / numBlocks : 0,
  };
}

export class Meter {
  constructor() {
    this.readings = []; // of the window, oldest first
    this.buckets = new Map(); // bucket number → {running, waiting, generated, prompts}
  }

  get last() {
    return this.readings.at(-1) ?? null;
  }

  push(event) {
    const now = sumEngines(event);
    const before = this.last;
    if (before && (now.time < before.time || now.generated < before.generated)) {
      this.readings = []; // another server answers
      this.buckets.clear();
    }
    const previous = this.last;
    this.readings.push(now);
    while (this.readings.length > 2 && this.readings[1].time < now.time - WINDOW_S) this.readings.shift();
    if (previous && now.time - previous.time < GAP_S) this.#spread(previous, now);
    const bucket = this.#bucket(Math.floor(now.time / BUCKET_S));
    if (now.running + now.waiting >= bucket.running + bucket.waiting) {
      bucket.running = now.running; // the fullest moment of a bucket stands for it
      bucket.waiting = now.waiting;
    }
    const oldest = Math.floor(now.time / BUCKET_S) - WINDOW_S / BUCKET_S;
    for (const number of this.buckets.keys()) if (number < oldest) this.buckets.delete(number);
    return now;
  }

  #bucket(number, { running, waiting } = { running: 0, waiting: 0 }) {
    if (!this.buckets.has(number)) this.buckets.set(number, { running, waiting, generated: 0, prompts: 0 });
    return this.buckets.get(number);
  }

  /** What came between two readings goes to the buckets between them, by their share of the time: a step of the
      engine may be longer than a bucket. */
  #spread(from, to) {
    const elapsed = to.time - from.time;
    if (elapsed <= 0) return;
    for (let number = Math.floor(from.time / BUCKET_S); number * BUCKET_S < to.time; number++) {
      const begin = Math.max(from.time, number * BUCKET_S);
      const end = Math.min(to.time, (number + 1) * BUCKET_S);
      const bucket = this.#bucket(number, from);
      for (const name of ["generated", "prompts"]) bucket[name] += ((to[name] - from[name]) * (end - begin)) / elapsed;
    }
  }

  /** Tokens per second of a counter over the last two seconds; null before there are two readings. */
  rate(name) {
    const { last, readings } = this;
    if (readings.length < 2) return null;
    const from = readings.findLast((reading) => reading.time <= last.time - RATE_S) ?? readings[0];
    return (last[name] - from[name]) / (last.time - from.time);
  }

  /** The share of prompt tokens found in the cache in the last minute, or if there were none, since the start. */
  hitRate() {
    const { last, readings } = this;
    if (!last) return { share: null, recent: false };
    const prompts = last.prompts - readings[0].prompts;
    if (prompts > 0) return { share: (last.cached - readings[0].cached) / prompts, recent: true };
    return { share: last.prompts ? last.cached / last.prompts : null, recent: false };
  }

  /** The buckets of the window, oldest first; null where nobody looked. Tokens are per second. */
  series() {
    if (!this.last) return [];
    const number = Math.floor(this.last.time / BUCKET_S);
    const series = [];
    for (let i = number - WINDOW_S / BUCKET_S + 1; i <= number; i++) {
      const bucket = this.buckets.get(i);
      series.push(bucket ? { ...bucket, generated: bucket.generated / BUCKET_S, prompts: bucket.prompts / BUCKET_S } : null);
    }
    return series;
  }
}

const LETTERS = "echs"; // empty, cached, held, shared: each outweighs those before it in a square of several

/** The states of blocks, 0 to 3, of their run-length form: "h2e40s" are 43 blocks. */
export function readBlocks(text) {
  const runs = [...text.matchAll(/([echs])(\d*)/g)].map(([, letter, count]) => [LETTERS.indexOf(letter), Number(count || 1)]);
  const states = new Uint8Array(runs.reduce((sum, [, count]) => sum + count, 0));
  let end = 0;
  for (const [state, count] of runs) states.fill(state, end, (end += count));
  return states;
}

/** How many of `numBlocks` blocks are in each state: an estimate where only some of them are told. */
export function countBlocks(states, numBlocks) {
  const counts = [0, 0, 0, 0];
  for (const state of states) counts[state]++;
  const scale = states.length ? numBlocks / states.length : 0;
  return counts.map((count) => Math.round(count * scale));
}

/** A square for each block or, where that would be too small to see, for several, as the busiest of them is. */
export function mapSquares(states, width, maxHeight, least = 6) {
  const most = Math.max(1, Math.floor(width / least) * Math.max(1, Math.floor(maxHeight / least)));
  const each = Math.max(1, Math.ceil(states.length / most));
  const squares = new Uint8Array(Math.ceil(states.length / each));
  for (let i = 0; i < squares.length; i++) squares[i] = Math.max(...states.subarray(i * each, (i + 1) * each));
  const columnsOf = (side) => Math.max(1, Math.floor(width / side));
  const rowsOf = (side) => Math.ceil(squares.length / columnsOf(side));
  const sizeOf = (side) => width / columnsOf(side); // a little larger, so that the rows are full
  let side = 18;
  while (side > least && rowsOf(side) * sizeOf(side) > maxHeight) side--;
  return { squares, each, size: sizeOf(side), columns: columnsOf(side), rows: rowsOf(side) };
}

/** A round number at or above the largest value, for the top of a chart. */
export function niceTop(value, least = 1) {
  const top = Math.max(value, least);
  const scale = 10 ** Math.floor(Math.log10(top));
  return [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10].map((step) => step * scale).find((step) => step >= top - 1e-9);
}

/** A number as people read it, – for one that is not known: whole, or a small one with a decimal. */
export function show(value, decimals = 0) {
  if (value === null || !Number.isFinite(value)) return "–";
  if (decimals && value > 0 && value < 9.95) return value.toFixed(decimals);
  return Math.round(value).toLocaleString("en");
}
