// Tries codex, which speaks OpenAI's newer API: an agent that reads a file with a tool of its own, and answers.
import assert from 'node:assert/strict';
import { spawnSync } from 'node:child_process';
import { mkdirSync, writeFileSync } from 'node:fs';
import { CASE, runChecks } from './checking.mjs';

const { tools: TOOLS } = CASE;
const folder = `${process.cwd()}/codex`;
const note = 'A note that only a tool can read.';

function codex() {
  mkdirSync(`${folder}/project`, { recursive: true });
  writeFileSync(`${folder}/project/note.txt`, note);
  writeFileSync(`${folder}/config.toml`, `
model = "${TOOLS.model}"
model_provider = "layerstream"
model_context_window = 60000

[model_providers.layerstream]
name = "layerstream"
base_url = "${TOOLS.url}/v1"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
`);
  // It asks nobody before it runs what the model calls, which is known; a sandbox may not be had everywhere.
  const done = spawnSync(`${process.env.CLIENT_MODULES}/.bin/codex`, [
    'exec', '--json', '--skip-git-repo-check', '--dangerously-bypass-approvals-and-sandbox', 'What is in the note?',
  ], {
    cwd: `${folder}/project`, env: { ...process.env, CODEX_HOME: folder }, encoding: 'utf8',
    timeout: 240_000, stdio: ['ignore', 'pipe', 'pipe'],
  });
  console.error(done.stderr, done.stdout);
  return done.stdout.split('\n').filter((line) => line.startsWith('{')).map((line) => JSON.parse(line));
}

let events;

async function callsItsTool() {
  events ??= codex();
  const ran = events.find((event) => event.type === 'item.completed' && event.item.type === 'command_execution');
  assert.match(ran.item.aggregated_output, /A note that only a tool can read/);
  assert.equal(ran.item.exit_code, 0);
}

async function answers() {
  events ??= codex();
  const said = events.filter((event) => event.type === 'item.completed' && event.item.type === 'agent_message');
  assert.equal(said.at(-1).item.text, TOOLS.after.text);
}

async function countsTokens() {
  events ??= codex();
  const { usage } = events.find((event) => event.type === 'turn.completed');
  assert.ok(usage.input_tokens > 1000);
  assert.ok(usage.output_tokens >= TOOLS.after.new_tokens);
}

await runChecks([callsItsTool, answers, countsTokens]);
