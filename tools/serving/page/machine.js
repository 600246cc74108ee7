// What the machine does, asked for every second while the page is seen.
import { duration, request, size } from "/page/service.js";

const element = (id) => document.getElementById(id);
const make = (name, properties = {}) => Object.assign(document.createElement(name), properties);
const percent = (share) => `${Math.round(share * 100)} %`;
const activities = [["working", "--host"], ["waiting_in", "--read"], ["waiting_out", "--decoding"]];

const doubt = (plan) => plan.contended.length ? ", by measurements on a busy machine" : plan.assumed.length ? ", partly assumed" : "";

function showFigures({ model, plan, stats, queue, forecast }) {
  const seconds = forecast?.measured_seconds ?? plan.predicted_sweep_seconds;
  element("welcome").textContent = `The weights are read again for each token, which takes about ${duration(seconds)}${forecast ? "" : doubt(plan)}. Requests at the same time share the reading.`;
  element("welcome").hidden = element("log").children.length > 0;
  element("model").textContent = `${model} · ${plan.device} · ${plan.reader} reads · ${size(plan.disk_bytes_per_sweep)} a sweep`;
  const rows = [
    ["Tokens", `${stats.tokens_generated} in ${stats.sweeps} sweeps`],
    ["Tokens per sweep", stats.tokens_per_sweep.toFixed(2)],
    ["Read for each token", size(stats.bytes_per_token)],
    ["Sweep, predicted", duration(plan.predicted_sweep_seconds) + doubt(plan)],
  ];
  if (forecast) rows.push(["Sweeps so far", `${duration(forecast.measured_seconds)} each, ${duration(forecast.predicted_seconds)} predicted`]);
  if (stats.experts_wanted) rows.push(["Experts in memory", `${percent(stats.expert_hits / stats.experts_wanted)} of ${stats.experts_wanted} wanted`]);
  rows.push(["Queue", `${queue.running} running, ${queue.waiting} waiting; ${queue.open_answers} of at most ${queue.max_answers} answers`]);
  element("figures").replaceChildren(...rows.flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]));
}

function draw(canvas, buckets) {
  const style = getComputedStyle(document.documentElement);
  canvas.width = buckets.length;
  canvas.height = 24;
  const context = canvas.getContext("2d");
  buckets.forEach((shares, column) => {
    let bottom = canvas.height;
    shares.forEach((share, index) => {
      const height = share * canvas.height;
      context.fillStyle = style.getPropertyValue(activities[index][1]);
      context.fillRect(column, bottom - height, 1, height);
      bottom -= height;
    });
  });
}

function showStages({ stages, window_seconds }) {
  element("window").textContent = window_seconds;
  const timeline = element("timeline");
  while (timeline.children.length < 2 * stages.length) timeline.append(make("span"), make("canvas"));
  stages.forEach((stage, index) => {
    const canvas = timeline.children[2 * index + 1];
    timeline.children[2 * index].textContent = stage.name;
    canvas.setAttribute("role", "img");
    canvas.setAttribute("aria-label", `${stage.name}: busy ${percent(stage.busy_share)} of the time`);
    draw(canvas, stage.buckets);
  });
  element("stages").replaceChildren(...stages.map((stage) => {
    const row = make("tr");
    row.append(make("th", { scope: "row", textContent: stage.name }));
    for (const value of [percent(stage.busy_share), size(stage.bytes_per_second), stage.batch < 0 ? "–" : stage.batch]) row.append(make("td", { textContent: value }));
    return row;
  }));
}

function legendOf(entries) {
  const line = make("p", { className: "legend" });
  for (const [name, text] of entries) {
    const entry = line.appendChild(make("span", { className: "entry" }));
    entry.append(make("span", { className: `key ${name}` }), text);
  }
  return line;
}

function showMap({ layers, legend, stages }) {
  const map = element("map");
  if (map.children.length !== layers.length) map.replaceChildren(...layers.map(() => make("i")));
  const at = Object.fromEntries(stages.map((stage) => [stage.name, stage.batch]));
  layers.forEach((layer, index) => {
    const cell = map.children[index];
    cell.className = layer.place;
    cell.classList.toggle("reading", index === at.read);
    cell.classList.toggle("computing", index === at.compute);
    cell.title = `${layer.label}: ${size(layer.bytes)}, ${legend[layer.place]}`;
  });
  const counts = Object.entries(legend).map(([place, meaning]) => [place, meaning, layers.filter((layer) => layer.place === place).length]).filter(([, , count]) => count);
  map.setAttribute("aria-label", `${layers.length} layer batches: ` + counts.map(([, meaning, count]) => `${count} ${meaning}`).join(", "));
  element("legend").replaceChildren(...legendOf(counts.map(([place, meaning, count]) => [place, `${count} x ${meaning}`])).childNodes);
}

function showMemory({ memory }) {
  element("memory").replaceChildren(...memory.flatMap((side) => {
    const bar = make("div", { className: "bar" });
    for (const part of side.parts) {
      const span = make("span", { className: part.name, title: `${part.name}: ${size(part.bytes)}` });
      span.style.width = `${(100 * part.bytes) / side.budget_bytes}%`;
      bar.append(span);
    }
    const used = side.parts.reduce((sum, part) => sum + part.bytes, 0);
    return [make("p", { textContent: `${side.name}: ${size(used)} of a budget of ${size(side.budget_bytes)}` }), bar, legendOf(side.parts.map((part) => [part.name, `${part.name} ${size(part.bytes)}`]))];
  }));
}

let shown = "";
async function look() {
  let pause = 1000;
  try {
    if (!document.hidden) {
      const machine = await (await request("/v1/machine")).json();
      showFigures(machine);
      showStages(machine);
      showMap(machine);
      showMemory(machine);
      shown = machine.trouble ?? "";
    }
  } catch (error) {
    shown = `The service does not answer: ${error.message}`;
    pause = 5000;
  }
  if (element("trouble").textContent !== shown) element("trouble").textContent = shown;
  setTimeout(look, pause);
}
look();
