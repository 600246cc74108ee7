// Requests to the service, with its API key if it has one.
const stored = "layerstream-key";
let key = sessionStorage.getItem(stored) ?? "";
let asking = null;

const dialog = document.getElementById("key-dialog");
const field = document.getElementById("key");

function askForKey(message) {
  document.getElementById("key-error").textContent = message;
  asking ??= new Promise((resolve) => {
    document.getElementById("key-form").onsubmit = (event) => {
      event.preventDefault();
      key = field.value;
      sessionStorage.setItem(stored, key);
      dialog.close();
    };
    dialog.onclose = () => { asking = null; resolve(); };
    dialog.showModal();
  });
  return asking;
}

/** Like fetch; asks for the key until the service takes it, and throws an Error with the service's own message. */
export async function request(path, options = {}) {
  for (let tries = 0; ; tries++) {
    const headers = { ...options.headers };
    if (options.body) headers["Content-Type"] = "application/json";
    const sent = key;
    if (sent) headers.Authorization = `Bearer ${sent}`;
    const response = await fetch(path, { ...options, headers });
    if (response.ok) return response;
    const body = await response.json().catch(() => ({}));
    const message = body.error?.message ?? `the service answered with status ${response.status}`;
    if (response.status !== 401 || tries > 9) throw new Error(message);
    if (sent === key) await askForKey(sent ? message : "");
  }
}

/** The events of a streamed answer: their data, parsed, or the text of a comment. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const event = text.slice(0, end);
      if (event.startsWith(":")) yield { comment: event.slice(1).trim() };
      else if (event.startsWith("data: ") && event !== "data: [DONE]") yield { data: JSON.parse(event.slice(6)) };
    }
  }
}

const units = ["B", "KiB", "MiB", "GiB", "TiB"];

/** A number of bytes as people read it. */
export function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return `${Number(bytes.toPrecision(3))} ${units[unit]}`;
}

/** Seconds as people read them. */
export function duration(seconds) {
  if (seconds < 1) return `${Number((seconds * 1000).toPrecision(3))} ms`;
  if (seconds < 120) return `${Number(seconds.toPrecision(3))} s`;
  return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
}
