// The page: asks every two seconds while it is looked at, listens to events, and draws. It changes nothing in the gateway.

import { follow, get, Refusal, remember, Unauthorized } from "./gateway.js";
import { curves, picture } from "./picture.js";
import { bits, clock, count, duration, holdings } from "./words.js";

const PERIOD = 2000; // milliseconds: the interval of the gateway's own rates
const HISTORY = 150;
const ROWS = 100;
const EVENTS = 200;

const at = (id) => document.getElementById(id);
const make = (name, attributes = {}, ...children) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

const seen = { status: null, traffic: null, spec: null, generation: null, history: [], all: false, sort: "in", up: -1, paused: false, held: [] };

// --- state of the gateway -----------------------------------------------------------------------------------------

async function refresh() {
  const [status, traffic] = await Promise.all([get("/v1/status"), get("/v1/traffic")]);
  if (status.initialized && status.appliance === "nat-gateway") {
    if (status.generation !== seen.generation) seen.spec = await get("/v1/gateway");
  } else {
    seen.spec = null;
  }
  seen.generation = status.generation;
  if (traffic.at !== seen.traffic?.at) {
    seen.history.push({ in: traffic.total.in.bytesPerSecond, out: traffic.total.out.bytesPerSecond });
    seen.history.splice(0, seen.history.length - HISTORY);
  }
  Object.assign(seen, { status, traffic });
  draw();
}

async function tick() {
  try {
    if (!document.hidden) await refresh();
    trouble("");
  } catch (error) {
    if (error instanceof Unauthorized) return login();
    trouble(error instanceof Refusal ? error.message : "The gateway does not answer; asking again.");
  }
  setTimeout(tick, PERIOD);
}

function trouble(text) {
  const place = at("trouble");
  if (place.textContent !== text) place.textContent = text;
  place.hidden = !text;
}

function login() {
  at("login").showModal();
}

at("login").addEventListener("close", () => {
  remember(at("token").value.trim());
  location.reload();
});

// --- drawing ------------------------------------------------------------------------------------------------------

function draw() {
  const { status, spec, traffic } = seen;
  const state = at("state");
  const words = !status.initialized ? "not initialized" : status.ready ? "ready" : "not ready";
  if (state.textContent !== words) state.textContent = words;
  state.className = `badge ${status.ready ? "good" : "bad"}`;
  at("pod").textContent = location.host;
  at("about").textContent = `version ${status.version}, up ${duration(status.uptimeSeconds)}, change ${status.generation}`;
  document.title = `${words}: NAT gateway`;
  at("picture").replaceChildren(picture(status, spec, traffic));
  drawHistory();
  drawEips();
  drawHealth();
  drawBusy();
}

function drawHistory() {
  const { element, top } = curves(seen.history, HISTORY);
  at("history-caption").textContent = seen.traffic.collector.running
    ? `The last ${Math.round((HISTORY * PERIOD) / 60000)} minutes; the highest point is ${bits(top)}`
    : `No rates: ${seen.traffic.collector.detail}`;
  at("history").replaceChildren(element, at("history-caption"));
}

const COLUMNS = [
  { id: "eip", name: "EIP", of: (row) => row.eip },
  { id: "held", name: "Leads to", of: (row) => row.held.length },
  { id: "in", name: "In", of: (row) => row.in.bytesPerSecond, number: true },
  { id: "out", name: "Out", of: (row) => row.out.bytesPerSecond, number: true },
  { id: "flows", name: "Connections", of: (row) => row.in.activeFlows + row.out.activeFlows, number: true },
  { id: "ports", name: "SNAT ports", of: (row) => row.snatPorts.busiest?.inUse ?? 0, number: true },
];

function drawHead() {
  at("eips-head").replaceChildren(...COLUMNS.map((column) => {
    const sorted = column.id === seen.sort;
    const button = make("button", { type: "button" }, column.name + (sorted ? (seen.up > 0 ? " ▲" : " ▼") : ""));
    button.addEventListener("click", () => {
      seen.up = sorted ? -seen.up : column.number ? -1 : 1;
      seen.sort = column.id;
      drawHead();
      drawEips();
      at("eips-head").querySelectorAll("button")[COLUMNS.indexOf(column)].focus();
    });
    const order = sorted ? (seen.up > 0 ? "ascending" : "descending") : "none";
    return make("th", { scope: "col", "aria-sort": order, class: column.number ? "number" : "" }, button);
  }));
}

function rows() {
  const held = seen.spec ? holdings(seen.spec) : new Map();
  const shared = new Set(seen.status.conflicts.map((conflict) => conflict.address));
  const wanted = at("search").value.trim().toLowerCase();
  const all = seen.traffic.eips.map((eip) => ({ ...eip, held: held.get(eip.eip) ?? [], conflict: shared.has(eip.eip) }));
  const matching = all.filter((row) => !wanted || [row.eip, ...row.held.flat()].some((text) => text.toLowerCase().includes(wanted)));
  const of = COLUMNS.find((column) => column.id === seen.sort).of;
  const compare = (a, b) => (typeof of(a) === "string" ? of(a).localeCompare(of(b), undefined, { numeric: true }) : of(a) - of(b));
  return { total: all.length, matching: matching.sort((a, b) => seen.up * compare(a, b) || a.eip.localeCompare(b.eip, undefined, { numeric: true })) };
}

function drawEips() {
  if (!seen.traffic) return;
  const { total, matching } = rows();
  const shown = seen.all ? matching : matching.slice(0, ROWS);
  at("found").textContent = matching.length === total ? `${total}` : `${matching.length} of ${total}`;
  at("more").hidden = shown.length === matching.length;
  at("eips").replaceChildren(...shown.map((row) => {
    const leads = row.held.slice(0, 8).map(([what, whom]) => make("div", {}, `${what} → `, make("code", {}, whom)));
    if (row.held.length > 8) leads.push(make("div", { class: "quiet" }, `and ${row.held.length - 8} more`));
    if (row.conflict) leads.push(make("div", { class: "bad" }, "another machine answers for it too"));
    const ports = row.snatPorts;
    const busiest = ports.busiest ? `${count(ports.busiest.inUse)} of ${count(ports.available)}` : "–";
    return make("tr", {},
      make("th", { scope: "row" }, make("code", {}, row.eip)),
      make("td", {}, ...(leads.length ? leads : [make("span", { class: "quiet" }, "nothing")])),
      make("td", { class: "number in" }, bits(row.in.bytesPerSecond)),
      make("td", { class: "number out" }, bits(row.out.bytesPerSecond)),
      make("td", { class: "number" }, count(row.in.activeFlows + row.out.activeFlows)),
      make("td", { class: "number", title: ports.busiest ? `to ${ports.busiest.address}:${ports.busiest.port}/${ports.busiest.protocol}` : "" }, busiest));
  }));
}

function drawHealth() {
  const { status, traffic } = seen;
  const { conntrack, collector } = traffic;
  const lost = (conntrack.drop ?? 0) + (conntrack.insertFailed ?? 0);
  const said = [
    ["Ready", status.ready ? "yes" : status.pending.join("; ") || "no", !status.ready],
    ["Changes", `${status.transactions.committed} made, ${status.transactions.unchanged} without effect, ${status.transactions.failed} failed`],
    ["Last failure", status.lastError ? `${clock(status.lastError.at)} ${status.lastError.by}: ${status.lastError.message}` : "none", Boolean(status.lastError)],
    ["Drift", drift(status.drift), status.drift?.differs.length > 0],
    ["Connections refused", `${count(lost)} (${count(conntrack.insertFailed ?? 0)} without a free port)`, lost > 0],
    ["Held by others", status.conflicts.map((conflict) => `${conflict.address} by ${conflict.mac}`).join(", ") || "none", status.conflicts.length > 0],
    ["BFD", bfd(status.bfd), false],
    ["Flow watcher", collector.running ? `${count(collector.flows)} connections followed, ${collector.lost} times behind` : collector.detail, !collector.running],
    ...status.warnings.map((warning) => ["Note", warning, true]),
  ];
  at("health").replaceChildren(...said.flatMap(([name, text, bad]) => [make("dt", {}, name), make("dd", bad ? { class: "bad" } : {}, text)]));
}

function drift(found) {
  if (!found) return "not watched";
  if (found.differs.length) return `${found.differs.length} differences, not repaired: ${found.differs[0]}`;
  if (!found.last) return "none seen";
  return `${found.repairs} repaired, last at ${clock(found.last.at)}: ${found.last.differences[0]}`;
}

function bfd(sessions) {
  if (!sessions?.length) return "no speaker of ours in this pod";
  return sessions.map((session) => `${session.remote} ${session.state}`).join(", ");
}

function drawBusy() {
  const list = (title, talkers) => {
    const rows = talkers.slice(0, 5).map((talker) => make("tr", {},
      make("th", { scope: "row" }, make("code", {}, talker.address)),
      make("td", { class: "number in" }, bits(talker.in.bytesPerSecond)),
      make("td", { class: "number out" }, bits(talker.out.bytesPerSecond))));
    const head = make("tr", {}, make("th", { scope: "col" }, title), make("th", { scope: "col", class: "number" }, "In"), make("th", { scope: "col", class: "number" }, "Out"));
    return rows.length ? [make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows))] : [make("p", { class: "quiet" }, `${title}: silent`)];
  };
  at("busy").replaceChildren(...list("Inside", seen.traffic.topSources), ...list("Outside", seen.traffic.topDestinations));
}

// --- what people do -----------------------------------------------------------------------------------------------

at("search").addEventListener("input", drawEips);
at("more").addEventListener("click", () => {
  seen.all = true;
  drawEips();
});

at("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  localStorage.setItem("natgw-theme", root.dataset.theme);
});

at("explain").addEventListener("submit", async (event) => {
  event.preventDefault();
  const asked = new URLSearchParams(new FormData(event.target));
  try {
    const answer = await get(`/v1/explain?${asked}`);
    const story = answer.story?.map((line) => line.text ?? line) ?? answer.text;
    at("answer").replaceChildren(
      make("p", { class: `badge ${answer.works === false ? "bad" : ""}` }, answer.verdict),
      make("ol", {}, ...story.map((line) => make("li", {}, line))),
      ...(answer.faults ?? []).map((fault) => make("p", { class: "bad" }, `${fault.what} ${fault.remedy ?? ""}`)));
  } catch (error) {
    if (error instanceof Unauthorized) return login();
    at("answer").replaceChildren(make("p", { class: "bad" }, error.message));
  }
});

at("pause").addEventListener("click", () => {
  seen.paused = !seen.paused;
  at("pause").setAttribute("aria-pressed", String(seen.paused));
  at("pause").textContent = seen.paused ? "Go on" : "Pause";
  if (!seen.paused) seen.held.splice(0).forEach(show);
});

function show(event) {
  const list = at("events");
  const asked = event.what === event.by ? event.what : `${event.by}: ${event.what}`;
  const line = make("li", event.outcome === "failed" ? { class: "bad" } : {},
    make("time", { datetime: new Date(event.at * 1000).toISOString() }, clock(event.at)),
    event.outcome === "failed" ? `failed: ${asked}` : asked,
    event.seconds === null ? "" : make("span", { class: "quiet" }, ` ${(event.seconds * 1000).toFixed(0)} ms`));
  list.prepend(line);
  while (list.children.length > EVENTS) list.lastChild.remove();
}

const theme = localStorage.getItem("natgw-theme");
if (theme) document.documentElement.dataset.theme = theme;
drawHead();
tick();
follow(50, (event) => (seen.paused ? seen.held.push(event) : show(event)), () => {});
