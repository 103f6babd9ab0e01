// The page's logic that needs no browser. Run by test_logic.py: node logic.mjs DIRECTORY-OF-THE-MODULES

import assert from "node:assert/strict";
import { pathToFileURL } from "node:url";

const at = (name) => import(pathToFileURL(`${process.argv[2]}/${name}`));
const { EventParser, Server, ServerError, readError, readEvents } = await at("stream.js");
const { Meter, countBlocks, mapSquares, niceTop, readBlocks, show } = await at("meter.js");

const tests = {
  "events are the same wherever the stream was cut"() {
    const text = ': a comment\n\ndata: {"a":"é"}\n\nevent: state\r\ndata: 1\r\ndata: 2\r\n\r\ndata: [DONE]\n\n';
    const whole = new EventParser().push(text);
    assert.deepEqual(whole.map(({ name }) => name), ["message", "state", "message"]);
    assert.deepEqual(whole.map(({ data }) => data), ['{"a":"é"}', "1\n2", "[DONE]"]);
    for (let cut = 1; cut < text.length; cut++) {
      if (text.slice(cut - 1, cut + 1) === "\r\n" || text[cut - 1] === "\r") continue; // no server cuts a line end
      const parser = new EventParser();
      assert.deepEqual([...parser.push(text.slice(0, cut)), ...parser.push(text.slice(cut))], whole, `cut at ${cut}`);
    }
  },

  async "a character cut in two comes out whole, and [DONE] ends the stream"() {
    const bytes = new TextEncoder().encode('data: {"text":"好"}\n\ndata: [DONE]\n\ndata: {"text":"late"}\n\n');
    const body = new ReadableStream({
      start(controller) {
        for (const byte of bytes) controller.enqueue(new Uint8Array([byte]));
        controller.close();
      },
    });
    const seen = [];
    for await (const event of readEvents(new Response(body))) seen.push(event);
    assert.deepEqual(seen, [{ text: "好" }]);
  },

  async "an error event is thrown in the server's words"() {
    const body = 'data: {"text":"a"}\n\ndata: {"error":{"message":"the engine died","code":500}}\n\n';
    const seen = [];
    const read = async () => {
      for await (const event of readEvents(new Response(body))) seen.push(event);
    };
    await assert.rejects(read, (error) => error instanceof ServerError && error.message === "the engine died");
    assert.equal(seen.length, 1);
  },

  "an error is what the server says, or what there is"() {
    const said = readError(400, '{"error":{"message":"n must be 1","param":"n","code":400}}');
    assert.deepEqual([said.status, said.message, said.param], [400, "n must be 1", "n"]);
    assert.equal(readError(502, "<h1>Bad gateway</h1>").message, "<h1>Bad gateway</h1>");
    assert.match(readError(504, "").message, /504/);
  },

  async "the key goes with each call, and a refusal asks for one"() {
    const sent = [];
    const refusals = [];
    globalThis.fetch = async (url, options) => {
      sent.push([String(url), options]);
      return new Response('{"error":{"message":"this server needs a key"}}', { status: 401 });
    };
    const server = new Server("http://host/gate/", () => "k", (words) => refusals.push(words));
    await assert.rejects(server.call("v1/completions", { body: { a: 1 } }), { status: 401 });
    const [[url, options]] = sent;
    assert.equal(url, "http://host/gate/v1/completions"); // the proxy's prefix stays
    assert.equal(options.headers.Authorization, "Bearer k");
    assert.deepEqual([options.method, options.body], ["POST", '{"a":1}']);
    assert.deepEqual(refusals, ["this server needs a key"]);
  },

  "blocks come out of their run-length form and are counted"() {
    const states = readBlocks("h2e40sc");
    assert.equal(states.length, 44);
    assert.deepEqual([...states.slice(0, 3), ...states.slice(-2)], [2, 2, 0, 3, 1]);
    assert.deepEqual(countBlocks(states, 44), [40, 1, 2, 1]);
    assert.deepEqual(countBlocks(states, 88), [80, 2, 4, 2]); // a map of every second block
    assert.equal(readBlocks("").length, 0);
  },

  "a square shows the busiest of its blocks, and all fit"() {
    for (const count of [1, 100, 305, 2_000, 16_384]) {
      const { rows, columns, size, squares } = mapSquares(new Uint8Array(count), 395, 120);
      assert.ok(rows * size <= 125 && columns * size <= 395.5 && rows * columns >= squares.length, String(count));
    }
    const states = new Uint8Array(10_922);
    states[5_000] = 2;
    const map = mapSquares(states, 390, 240);
    assert.ok(map.rows * map.size <= 260 && map.columns * map.size <= 390.5, JSON.stringify(map));
    assert.equal(map.squares[Math.floor(5_000 / map.each)], 2);
    assert.equal(map.squares.filter((state) => state === 2).length, 1);
    assert.ok(map.squares.length <= map.rows * map.columns);
    assert.equal(mapSquares(new Uint8Array(12), 390, 240).each, 1);
  },

  "rates come of the counters, and a slow step is spread over its time"() {
    const meter = new Meter();
    const engine = { num_waiting_reqs: 1, kv_cache_usage: 0.5, num_prompt_tokens: 0, num_cached_tokens: 0, num_blocks: 4 };
    const at = (time, generated) =>
      meter.push({ time, engines: [{ ...engine, num_running_reqs: 2, num_generation_tokens: generated }] });
    at(100, 0);
    assert.equal(meter.rate("generated"), null);
    at(102, 200); // one reading after two seconds
    assert.equal(meter.rate("generated"), 100);
    const known = meter.series().filter((bucket) => bucket !== null);
    assert.deepEqual(known.map(({ generated }) => Math.round(generated)), [100, 100, 100, 100, 0]);
    assert.ok(known.every(({ running, waiting }) => running === 2 && waiting === 1));
    at(300, 900); // nobody looked for a while
    assert.equal(meter.series().filter((bucket) => bucket !== null).length, 1);
    at(1, 10); // another server answers now
    assert.equal(meter.readings.length, 1);
  },

  "several engines are shown as one"() {
    const meter = new Meter();
    const engine = { num_waiting_reqs: 0, num_generation_tokens: 5, num_prompt_tokens: 20, num_cached_tokens: 10 };
    const now = meter.push({
      time: 1,
      engines: [
        { ...engine, num_running_reqs: 2, kv_cache_usage: 1, num_blocks: 10 },
        { ...engine, num_running_reqs: 3, kv_cache_usage: 0, num_blocks: 30 },
      ],
    });
    assert.deepEqual([now.running, now.generated, now.usage], [5, 10, 0.25]);
    assert.deepEqual(meter.hitRate(), { share: 0.5, recent: false });
  },

  "numbers are shown as people read them"() {
    assert.deepEqual([show(null), show(5), show(4.26, 1), show(1234.4, 1)], ["–", "5", "4.3", "1,234"]);
    assert.deepEqual([niceTop(0, 4), niceTop(11), niceTop(64), niceTop(7_100)], [4, 12, 80, 8_000]);
  },
};

for (const [name, test] of Object.entries(tests)) {
  await test();
  console.log(`ok: ${name}`);
}
