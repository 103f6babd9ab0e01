// The official client for Node: npm install openai; node openai_node.mjs
//
// Chat, tools with the client's own runner, structured output, responses, a stream that is stopped, and the class of
// each error. See README.md for the server that it asks.

import assert from "node:assert/strict";
import OpenAI from "openai";

const baseURL = process.env.BASE_URL ?? "http://127.0.0.1:8000/v1";
const apiKey = process.env.KEY ?? "example";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const { data } = await client.models.list();
const model = data[0].id;
const hello = [{ role: "user", content: "Hello!" }];
const story = [{ role: "user", content: "Tell me a story about a fox." }];
const weather = [{ role: "user", content: "What is the weather in Paris?" }];
const getWeather = {
  name: "get_weather",
  description: "Get the weather of a city",
  parameters: { type: "object", properties: { city: { type: "string" } }, required: ["city"] },
};

async function chat() {
  const answer = await client.chat.completions.create({ model, messages: hello, temperature: 0, max_tokens: 50 });
  assert.equal(answer.choices[0].finish_reason, "stop");
  return answer.choices[0].message.content;
}

async function streamedChatWithUsage() {
  const ask = { model, messages: story, temperature: 0, max_tokens: 60 };
  const stream = await client.chat.completions.create({ ...ask, stream: true, stream_options: { include_usage: true } });
  let [text, usage] = ["", null];
  for await (const chunk of stream) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, (await client.chat.completions.create(ask)).choices[0].message.content);
  assert.equal(usage.completion_tokens, 60);
  return `${usage.total_tokens} tokens`;
}

async function aStoppedStream() {
  const stream = await client.chat.completions.create({ model, messages: story, max_tokens: 400, stream: true });
  for await (const _ of stream) break; // leaving the loop closes the connection, and the server aborts the request
  return stream.controller.signal.aborted;
}

async function completion() {
  const answer = await client.completions.create({ model, prompt: "Once upon a time", max_tokens: 8, logprobs: 2, seed: 1 });
  assert.equal(answer.choices[0].logprobs.token_logprobs.length, 8);
  return answer.choices[0].text;
}

async function toolsByTheClientsRunner() {
  const asked = [];
  const runner = client.chat.completions.runTools({
    model,
    messages: weather,
    temperature: 0,
    stream: true,
    tools: [
      {
        type: "function",
        function: {
          ...getWeather,
          parse: JSON.parse,
          function: ({ city }) => {
            asked.push(city);
            return { weather: "sunny" };
          },
        },
      },
    ],
  });
  const answer = await runner.finalContent();
  assert.deepEqual(asked, ["Paris"]);
  return answer;
}

async function structuredOutput() {
  const schema = {
    type: "object",
    properties: { name: { type: "string", maxLength: 20 }, age: { type: "integer", minimum: 0, maximum: 99 } },
    required: ["name", "age"],
    additionalProperties: false,
  };
  const answer = await client.chat.completions.parse({
    model,
    messages: hello,
    max_tokens: 80,
    response_format: { type: "json_schema", json_schema: { name: "person", schema, strict: true } },
  });
  const person = JSON.parse(answer.choices[0].message.content);
  assert.deepEqual(Object.keys(person).sort(), ["age", "name"]);
  return JSON.stringify(person);
}

async function streamedResponse() {
  const stream = client.responses.stream({ model, input: "Tell me a story about a fox.", temperature: 0, max_output_tokens: 60 });
  let text = "";
  stream.on("response.output_text.delta", (event) => (text += event.delta));
  const last = await stream.finalResponse();
  assert.equal(last.status, "incomplete");
  assert.equal(last.output_text, text);
  return `${last.usage.output_tokens} tokens`;
}

async function errors() {
  const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
  const told = [];
  for (const [kind, call] of [
    [OpenAI.BadRequestError, () => client.chat.completions.create({ model, messages: hello, temperature: -1 })],
    [OpenAI.AuthenticationError, () => stranger.models.list()],
    [OpenAI.NotFoundError, () => client.chat.completions.create({ model: "other", messages: hello })],
    [OpenAI.NotFoundError, () => client.embeddings.create({ model, input: "no embeddings here" })],
  ]) {
    await assert.rejects(call, (error) => error instanceof kind && told.push(`${error.status} ${kind.name}`) > 0);
  }
  return told.join(", ");
}

async function tooManyAtOnce() {
  const calls = Array.from({ length: 32 }, () => client.chat.completions.create({ model, messages: story, max_tokens: 200 }));
  const results = await Promise.allSettled(calls);
  const refused = results.filter((result) => result.status === "rejected");
  assert.ok(refused.length > 0 && refused.length < 32);
  for (const { reason } of refused) assert.ok(reason instanceof OpenAI.InternalServerError && reason.status === 503);
  return `${32 - refused.length} answered, ${refused.length} told 503`;
}

console.log(`openai for Node against ${baseURL}`);
for (const step of [
  chat, streamedChatWithUsage, aStoppedStream, completion, toolsByTheClientsRunner, structuredOutput, streamedResponse,
  errors, tooManyAtOnce,
]) {
  console.log(`${step.name}: ${JSON.stringify(await step())}`.slice(0, 160));
}
