// Tries Vercel's ai with its provider for OpenAI-compatible servers: chats, tools, text and embeddings.
import assert from 'node:assert/strict';
import { createRequire } from 'node:module';
import { CASE, runChecks } from './checking.mjs';

const require = createRequire(`${process.env.CLIENT_MODULES}/`);
const { embed, generateText, stepCountIs, streamText, tool } = require('ai');
const { createOpenAICompatible } = require('@ai-sdk/openai-compatible');
const { z } = require('zod');
const { chat: CHAT, completion: TEXT, tools: TOOLS } = CASE;
const plain = createOpenAICompatible({
  name: 'plain', baseURL: `${CASE.url}/v1`, apiKey: CASE.key, includeUsage: true,
});
const agents = createOpenAICompatible({
  name: 'agents', baseURL: `${TOOLS.url}/v1`, apiKey: 'any', includeUsage: true,
});
const [{ content: system }, { content: prompt }] = CHAT.messages;
const options = {
  model: plain(CASE.model), system, prompt, maxOutputTokens: CHAT.max_tokens, temperature: 0, maxRetries: 0,
};

// What an agent is asked, and the calls that it makes.
function looking() {
  const calls = [];
  const look = tool({
    description: TOOLS.tool.function.description,
    inputSchema: z.object({ at: z.string(), times: z.number() }),
    execute: async (given) => { calls.push(given); return TOOLS.result; },
  });
  return {
    calls,
    asked: {
      model: agents(TOOLS.model), prompt: TOOLS.messages[0].content, tools: { look },
      stopWhen: stepCountIs(3), maxOutputTokens: TOOLS.max_tokens, temperature: 0, maxRetries: 0,
    },
  };
}

function isChat(text, reason, usage) {
  assert.equal(text, CHAT.text);
  assert.equal(reason, CHAT.finish_reason);
  assert.equal(usage.inputTokens, CHAT.prompt_tokens);
  assert.equal(usage.outputTokens, CHAT.new_tokens);
}

async function chat() {
  const done = await generateText(options);
  isChat(done.text, done.finishReason, done.usage);
}

async function streamedChat() {
  const done = streamText(options);
  const pieces = [];
  for await (const piece of done.textStream) pieces.push(piece);
  assert.ok(pieces.length > 1);
  isChat(pieces.join(''), await done.finishReason, await done.usage);
}

async function textCompletion() {
  const done = await generateText({
    ...options, system: undefined, model: plain.completionModel(CASE.model), prompt: TEXT.prompt,
  });
  // The provider writes a prompt of its own, as if for a chat; how long it is tells that it came.
  assert.equal(done.usage.outputTokens, TEXT.max_tokens);
}

async function embeddings() {
  const done = await embed({ model: plain.textEmbeddingModel(CASE.model), value: CASE.embedding.input, maxRetries: 0 });
  assert.equal(done.embedding.length, CASE.embedding.vector.length);
  done.embedding.forEach((value, index) => assert.ok(Math.abs(value - CASE.embedding.vector[index]) < 1e-5));
  assert.equal(done.usage.tokens, CASE.embedding.tokens);
}

async function tools() {
  const { calls, asked } = looking();
  const done = await generateText(asked);
  assert.equal(done.text, TOOLS.after.text);
  assert.equal(done.finishReason, 'stop');
  assert.deepEqual(calls, [TOOLS.call.arguments]);
  assert.equal(done.steps[0].text, TOOLS.text);
  assert.equal(done.steps[0].reasoningText, TOOLS.reasoning);
  assert.equal(done.steps[0].finishReason, 'tool-calls');
}

async function streamedTools() {
  const { calls, asked } = looking();
  const done = streamText(asked);
  await done.consumeStream();
  assert.equal(await done.text, TOOLS.after.text);
  assert.deepEqual(calls, [TOOLS.call.arguments]);
  assert.equal((await done.steps)[0].reasoningText, TOOLS.reasoning);
}

await runChecks([chat, streamedChat, textCompletion, embeddings, tools, streamedTools]);
