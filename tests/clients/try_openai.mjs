// Tries OpenAI's client for JavaScript: chats, tools, log probabilities, text, embeddings and responses.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { CASE, runChecks } from './checking.mjs';

const require = createRequire(`${process.env.CLIENT_MODULES}/`);
const OpenAI = require('openai').default;
const { chat: CHAT, completion: TEXT, tools: TOOLS } = CASE;
const client = new OpenAI({ baseURL: `${CASE.url}/v1`, apiKey: CASE.key, maxRetries: 0 });
const agent = new OpenAI({ baseURL: `${TOOLS.url}/v1`, apiKey: 'any', maxRetries: 0 });
const options = {
  model: CASE.model, messages: CHAT.messages, max_tokens: CHAT.max_tokens, temperature: 0,
};
const toolOptions = {
  model: TOOLS.model, messages: TOOLS.messages, tools: [TOOLS.tool],
  max_tokens: TOOLS.max_tokens, temperature: 0,
};

function close(values, expected) {
  assert.equal(values.length, expected.length);
  values.forEach((value, index) => assert.ok(Math.abs(value - expected[index]) < 1e-4));
}

function isCall(call) {
  assert.equal(call.function.name, TOOLS.call.name);
  assert.deepEqual(JSON.parse(call.function.arguments), TOOLS.call.arguments);
}

async function chat() {
  const done = await client.chat.completions.create(options);
  assert.equal(done.choices[0].message.content, CHAT.text);
  assert.equal(done.choices[0].finish_reason, CHAT.finish_reason);
  assert.equal(done.usage.prompt_tokens, CHAT.prompt_tokens);
  assert.equal(done.usage.completion_tokens, CHAT.new_tokens);
}

async function streamedChat() {
  const streamed = { ...options, stream: true, stream_options: { include_usage: true } };
  const chunks = [];
  for await (const chunk of await client.chat.completions.create(streamed)) chunks.push(chunk);
  const choices = chunks.flatMap((chunk) => chunk.choices);
  assert.equal(choices.map((choice) => choice.delta.content ?? '').join(''), CHAT.text);
  assert.equal(choices.at(-1).finish_reason, CHAT.finish_reason);
  assert.equal(chunks.at(-1).usage.completion_tokens, CHAT.new_tokens);
}

async function logprobs() {
  const done = await client.chat.completions.create({ ...options, logprobs: true, top_logprobs: 2 });
  const tokens = done.choices[0].logprobs.content;
  close(tokens.map((token) => token.logprob), CHAT.logprobs);
  close(tokens.map((token) => token.top_logprobs[1].logprob), CHAT.second);
}

async function textCompletion() {
  const done = await client.completions.create({
    model: CASE.model, prompt: TEXT.prompt, max_tokens: TEXT.max_tokens, temperature: 0,
  });
  assert.equal(done.choices[0].text, TEXT.text);
  assert.equal(done.choices[0].finish_reason, TEXT.finish_reason);
  assert.equal(done.usage.completion_tokens, TEXT.new_tokens);
}

async function embeddings() {
  const done = await client.embeddings.create({ model: CASE.model, input: [CASE.embedding.input] });
  close(done.data[0].embedding, CASE.embedding.vector);
  assert.equal(done.usage.prompt_tokens, CASE.embedding.tokens);
}

async function tools() {
  const done = await agent.chat.completions.create(toolOptions);
  const { message, finish_reason: reason } = done.choices[0];
  assert.equal(message.content, TOOLS.text);
  assert.equal(reason, 'tool_calls');
  assert.equal(message.tool_calls.length, 1);
  isCall(message.tool_calls[0]);
  const answer = { role: 'tool', tool_call_id: message.tool_calls[0].id, content: TOOLS.result };
  const messages = [...TOOLS.messages, message, answer];
  const after = await agent.chat.completions.create({ ...toolOptions, messages });
  assert.equal(after.choices[0].message.content, TOOLS.after.text);
  assert.equal(after.choices[0].finish_reason, 'stop');
}

async function streamedTools() {
  const done = await agent.chat.completions.stream(toolOptions).finalChatCompletion();
  assert.equal(done.choices[0].message.content, TOOLS.text);
  assert.equal(done.choices[0].finish_reason, 'tool_calls');
  isCall(done.choices[0].message.tool_calls[0]);
}

async function runTools() {
  const calls = [];
  const look = (given) => { calls.push(JSON.parse(given)); return TOOLS.result; };
  const tool = { type: 'function', function: { ...TOOLS.tool.function, function: look } };
  const runner = agent.chat.completions.runTools({ ...toolOptions, tools: [tool] });
  assert.equal(await runner.finalContent(), TOOLS.after.text);
  assert.deepEqual(calls, [TOOLS.call.arguments]);
}

async function responses() {
  const done = await client.responses.create({
    model: CASE.model, instructions: CHAT.messages[0].content, input: CHAT.messages[1].content,
    max_output_tokens: CHAT.max_tokens, temperature: 0,
  });
  assert.equal(done.output_text, CHAT.text);
  assert.equal(done.usage.output_tokens, CHAT.new_tokens);
}

await runChecks([
  chat, streamedChat, logprobs, textCompletion, embeddings, tools, streamedTools, runTools, responses,
]);
