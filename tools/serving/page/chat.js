// The conversation: sends, streams, stops.
import { Markdown } from "/page/markdown.js";
import { duration, events, request } from "/page/service.js";

const element = (id) => document.getElementById(id);
const log = element("log"), text = element("text"), status = element("status");
const send = element("send"), stop = element("stop");
let messages = [];
let model = null;
let running = null; // the AbortController of the answer under way

function show(role, content) {
  const article = document.createElement("article");
  article.className = role;
  const title = document.createElement("h2");
  title.textContent = role === "user" ? "You" : "Model";
  const body = document.createElement("div");
  body.className = "said";
  if (content) body.append(Object.assign(document.createElement("p"), { textContent: content }));
  article.append(title, body);
  element("welcome").hidden = true;
  log.append(article);
  log.scrollTop = log.scrollHeight;
  return { article, body };
}

function note(article, content, failed = false) {
  const line = document.createElement("p");
  line.className = failed ? "note failed" : "note";
  line.textContent = content;
  article.append(line);
}

function addReasoning(article, body, content) {
  let box = article.querySelector("details p");
  if (!box) {
    const details = document.createElement("details");
    details.append(Object.assign(document.createElement("summary"), { textContent: "Reasoning" }));
    box = details.appendChild(document.createElement("p"));
    body.before(details);
  }
  box.textContent += content;
}

function requestBody() {
  const system = element("system").value.trim();
  const body = {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if (element("temperature").value !== "") body.temperature = Number(element("temperature").value);
  if (element("limit").value !== "") body.max_tokens = Number(element("limit").value);
  return JSON.stringify(body);
}

async function knownModel() {
  model ??= (await (await request("/v1/models")).json()).data[0].id;
  return model;
}

/** Ask for an answer and show it as it comes; returns its text. */
async function answer(article, body, asked, signal) {
  await knownModel();
  const began = performance.now();
  const shown = new Markdown(body);
  let said = "", first = null, usage = null;
  const follow = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;
  const times = () => {
    if (first === null) return;
    const seconds = (performance.now() - began) / 1000, tokens = usage?.completion_tokens;
    const rate = tokens > 1 ? `, ${((tokens - 1) / (seconds - first)).toFixed(2)} tokens/s` : "";
    note(article, `${tokens ? `${tokens} tokens, ` : ""}the first after ${duration(first)}${rate}`);
  };
  try {
    const response = await request("/v1/chat/completions", { method: "POST", body: requestBody(), signal });
    for await (const { comment, data } of events(response)) {
      if (comment !== undefined) { status.textContent = comment; continue; }
      if (data.error) throw new Error(data.error.message);
      usage = data.usage ?? usage;
      const delta = data.choices?.[0]?.delta ?? {};
      if (!delta.content && !delta.reasoning_content) continue;
      first ??= (performance.now() - began) / 1000;
      status.textContent = "The answer comes …";
      const following = follow();
      if (delta.reasoning_content) addReasoning(article, body, delta.reasoning_content);
      said += delta.content ?? "";
      shown.show(said);
      if (following) log.scrollTop = log.scrollHeight;
    }
    status.textContent = "The answer is complete.";
    times();
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    status.textContent = "Stopped.";
    note(article, "stopped");
  } finally {
    if (said) asked.push({ role: "assistant", content: said });
  }
  return said;
}

/** As if it was not asked: the message can be changed and sent again. */
function takeBack(asked, content) {
  asked.pop();
  if (asked === messages && !text.value) text.value = content;
}

async function ask(content) {
  const asked = messages; // "New chat" begins others
  asked.push({ role: "user", content });
  show("user", content);
  const { article, body } = show("assistant", "");
  running = new AbortController();
  stop.disabled = false;
  if (document.activeElement === send) stop.focus(); // a disabled button would lose the keyboard
  send.disabled = true;
  article.setAttribute("aria-busy", "true"); // read aloud when it is complete, not word by word
  status.textContent = "Waiting for the first token …";
  let said = "";
  try {
    said = await answer(article, body, asked, running.signal);
  } catch (error) {
    note(article, error.message, true);
    status.textContent = "That failed.";
  } finally {
    if (!said) takeBack(asked, content);
    running = null;
    article.removeAttribute("aria-busy");
    send.disabled = false;
    if (document.activeElement === stop) send.focus();
    stop.disabled = true;
  }
}

element("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const content = text.value.trim();
  if (!content || running) return;
  text.value = "";
  ask(content);
});
text.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  element("ask").requestSubmit();
});
stop.addEventListener("click", () => { running?.abort(); text.focus(); });
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
element("reset").addEventListener("click", () => {
  running?.abort();
  messages = [];
  log.replaceChildren();
  status.textContent = "";
  text.focus();
});
