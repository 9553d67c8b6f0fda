// Draws what the views say. Texts of peers come from strangers: they are only ever set as text.
"use strict";

const params = new URLSearchParams(location.hash.slice(1));
const token = params.get("token") || "";
const $ = (id) => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];
let view = params.get("view") || "overview";
let seen = null;
let sort = { key: "name", down: false };
const live = { time: [], loss: [], speed: [] };
let curves = null;

function element(name, text, attributes) {
  const made = document.createElement(name);
  if (text !== undefined && text !== null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  return made;
}
const whole = (value) => (value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en"));
const fixed = (value, digits) => (value === null || value === undefined ? "–" : value.toFixed(digits));
const percent = (value) => (value === null || value === undefined ? "–" : `${(100 * value).toFixed(0)} %`);
function short(value) {
  if (value === null || value === undefined) return "–";
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e4]])
    if (value >= size) return `${(value / (unit === "k" ? 1e3 : size)).toFixed(1)} ${unit}`;
  return Math.round(value).toLocaleString("en");
}
function span(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
  return `${Math.round(seconds / 86400)} days`;
}
async function ask(path) {
  const answer = await fetch(path, { headers: token ? { authorization: `Bearer ${token}` } : {} });
  const value = await answer.json();
  if (!answer.ok) throw new Error(value.error || answer.statusText);
  return value;
}

// columns: [title, key or function, "number" | "wide" | "name" | "", draw(row, cell) or undefined]
function table(columns, rows, onSort) {
  // On a phone each row is a card, laid out as blocks: roles keep it a table for who has it read aloud.
  const made = element("table", undefined, { role: "table" });
  if (onSort) made.className = "sortable";
  const head = made.createTHead().insertRow();
  head.setAttribute("role", "row");
  for (const column of columns) {
    const cell = element("th", undefined, { scope: "col", role: "columnheader" });
    if (column[2]) cell.className = column[2];
    if (onSort && typeof column[1] === "string") {
      const button = element("button", column[0], { type: "button" });
      if (sort.key === column[1]) cell.setAttribute("aria-sort", sort.down ? "descending" : "ascending");
      button.addEventListener("click", () => onSort(column[1], column[2] === "number"));
      cell.append(button);
    } else cell.textContent = column[0];
    head.append(cell);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    line.setAttribute("role", "row");
    for (const column of columns) {
      const cell = line.insertCell();
      cell.setAttribute("role", "cell");
      cell.dataset.title = column[0];
      if (column[2]) cell.className = column[2];
      const value = typeof column[1] === "function" ? column[1](row) : row[column[1]];
      if (column[3]) column[3](row, cell, value);
      else cell.textContent = value === null || value === undefined || value === "" ? "–" : value;
      if (["–", ""].includes(cell.textContent)) cell.classList.add("nothing");
    }
  }
  return made;
}
function put(id, child) {
  const place = $(id);
  // What a reader has scrolled to or focused stays where it is.
  const left = place.scrollLeft;
  const focused = place.contains(document.activeElement) ? document.activeElement.textContent : null;
  place.replaceChildren(child);
  place.scrollLeft = left;
  if (focused) [...place.querySelectorAll("button")].find((one) => one.textContent === focused)?.focus();
}

function drawHealth(id, health) {
  const words = { ok: "✓ ", warn: "! ", fail: "✗ " };
  const text = words[health.level] + health.text;
  if ($(id).textContent !== text) $(id).textContent = text;
  $(id).className = `health ${health.level}`;
}

function drawOverview() {
  const { overview, run, evaluation } = seen;
  const tile = (text, value) => {
    const made = element("div", undefined, { class: "tile" });
    made.append(element("b", value), element("span", text));
    return made;
  };
  const count = Object.values(overview.peers).reduce((a, b) => a + b, 0);
  const atWork = (overview.peers.training || 0) + (overview.peers.solo || 0);
  const others = Object.entries(overview.peers).filter(([state]) => !["training", "solo"].includes(state));
  const tiles = [
    tile(overview.last_round ? `round of ${whole(overview.last_round)}` : "round", whole(run.round)),
    tile("until the run is done", overview.eta_seconds === null ? "–" : span(overview.eta_seconds)),
    tile("train loss, middle peer", fixed(overview.train_loss, 3)),
    tile(
      evaluation ? `held-out ${evaluation.headline.replaceAll("_", " ")}, round ${evaluation.round}` : "held-out",
      evaluation ? fixed(evaluation.median, 3) : "–",
    ),
    tile("tokens a second in all", short(overview.tokens_per_second)),
    tile(`peers train${others.map(([state, some]) => `, ${some} ${state}`).join("")}`, `${atWork} of ${count}`),
  ];
  $("tiles").replaceChildren(...tiles);
  $("branches").replaceChildren(
    ...seen.branches.map((one) =>
      element("p", `branch ${one.state_id.slice(0, 16)} at round ${one.round}: ${one.peers.join(", ")}`, { class: "health warn" }),
    ),
  );
  const spent = overview.round_seconds;
  if (spent) {
    const all = Object.values(spent).reduce((a, b) => a + b, 0) || 1;
    const marks = ["--one", "--two", "--three", "--four"];
    const bar = element("div", undefined, { class: "bar" });
    const keys = Object.entries(spent).map(([name, seconds], n) => {
      const piece = element("i");
      piece.style.background = `var(${marks[n]})`;
      piece.style.width = `${(100 * seconds) / all}%`;
      bar.append(piece);
      const key = element("span", `${name} ${seconds.toFixed(2)} s`, { class: "key" });
      key.style.setProperty("--mark", `var(${marks[n]})`);
      return key;
    });
    const total = element("span", `a round takes ${all.toFixed(2)} s`, { class: "quiet" });
    $("split").replaceChildren(bar, ...keys, total);
    $("split").setAttribute("aria-label", `a round takes ${all.toFixed(2)} s: ${keys.map((k) => k.textContent).join(", ")}`);
  }
  drawCharts();
}

const charts = {};
function chart(id, data, series, time) {
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const width = Math.max(200, $(id).clientWidth);
  const theme = color("--text") + series.length + time;
  if (charts[id] && charts[id].theme === theme) {
    if (charts[id].width !== width) charts[id].plot.setSize({ width, height: 190 });
    charts[id].width = width;
    charts[id].plot.setData(data);
    return;
  }
  charts[id]?.plot.destroy();
  const axis = { stroke: color("--quiet"), grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line") } };
  const plot = new uPlot(
    {
      width,
      height: 190,
      legend: { show: series.length > 1, live: false },
      cursor: { points: { size: 6 } },
      scales: { x: { time } },
      axes: [{ ...axis }, { ...axis, size: 52, values: (_, ticks) => ticks.map((tick) => (Math.abs(tick) >= 1e4 ? short(tick) : tick)) }],
      series: [{}, ...series.map(([label, mark]) => ({ label, stroke: color(mark), width: 2, points: { show: false }, spanGaps: true }))],
    },
    data,
    $(id),
  );
  charts[id] = { plot, width, theme };
}
function drawCharts() {
  if (view !== "overview" || !seen) return;
  const past = curves && curves.round.length > 1;
  $("loss-of").textContent = past ? "of this home's peer, by round" : "of the middle peer, since this page is open";
  $("speed-of").textContent = past ? "of this home's peer, by round" : "in all, since this page is open";
  if (past) {
    chart("chart-loss", [curves.round, curves.train_loss], [["loss", "--one"]], false);
    chart("chart-speed", [curves.round, curves.tokens_per_second], [["tokens/s", "--two"]], false);
  } else {
    chart("chart-loss", [live.time, live.loss], [["loss", "--one"]], true);
    chart("chart-speed", [live.time, live.speed], [["tokens/s", "--two"]], true);
  }
  const points = seen.points;
  chart("chart-members", [points.round, points.included, points.members], [["included", "--four"], ["members", "--three"]], false);
  chart("chart-work", [points.round, points.sequences], [["sequences", "--one"]], false);
}

const state = (row, cell, value) => cell.append(element("span", value, { class: `state ${value}` }));
const peerColumns = [
  ["Name", "name", "name"],
  ["State", "state", "", state],
  ["Peer", (row) => row.peer_id.slice(-8), ""],
  ["Round", "round", "number"],
  ["Tokens/s", "tokens_per_second", "number", (row, cell, value) => (cell.textContent = whole(value))],
  ["Share", "share", "number", (row, cell, value) => (cell.textContent = percent(value))],
  ["Late", "late", "number", (row, cell, value) => (cell.textContent = row.rounds ? `${value}/${row.rounds}` : "–")],
  ["Path", "path", ""],
  ["Last fault", (row) => (row.fault ? `${row.fault}, round ${row.fault_round}` : "–"), ""],
  ["Loss", "train_loss", "number", (row, cell, value) => (cell.textContent = fixed(value, 3))],
  ["Compute", (row) => (row.round_seconds ? `${row.round_seconds.computing.toFixed(2)} s` : "–"), "number"],
  ["Exchange", (row) => (row.round_seconds ? `${row.round_seconds.exchange.toFixed(2)} s` : "–"), "number"],
  ["Device", "device", "name"],
  ["Version", "version", ""],
  ["Seen", "last_seen_seconds", "number", (row, cell, value) => (cell.textContent = `${value.toFixed(0)} s ago`)],
];
function drawPeers() {
  const sign = sort.down ? -1 : 1;
  const rows = [...seen.peers].sort((a, b) => {
    const [x, y] = [a[sort.key], b[sort.key]];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (x < y ? -1 : x > y ? 1 : 0);
  });
  const onSort = (key, number) => {
    sort = { key, down: sort.key === key ? !sort.down : number };
    drawPeers();
  };
  put("peers-table", table(peerColumns, rows, onSort));
}
const roundColumns = [
  ["Round", "round", "number"],
  ["Sealed by", "sealer", "name"],
  ["Turn", (row) => (row.solo ? "alone" : row.takeover ? `takeover ${row.place}` : "its own"), ""],
  ["Included", (row) => `${row.included.length}/${row.members}`, "number"],
  ["Sequences", "sequences", "number"],
  ["Skipped parts", (row) => `${row.skipped_parts}/${row.parts}`, "number"],
  ["Late", (row) => row.late.join(", "), "name"],
  [
    "What else",
    (row) =>
      [
        ...Object.entries(row.faults).map(([name, fault]) => `${name}: ${fault}`),
        ...row.joins.map((name) => `${name} admitted`),
        ...row.let_in.map((name) => `${name} let in`),
        ...row.shut_out.map((name) => `${name} shut out`),
      ].join("; "),
    "wide",
  ],
  ["State", (row) => row.state_id.slice(0, 8), ""],
];
function drawRounds() {
  if (!seen.rounds.length) return put("rounds-table", element("p", "No peer hands out seals.", { class: "hint" }));
  put("rounds-table", table(roundColumns, seen.rounds));
}
function drawExchange() {
  const { peers, parts } = seen.flows;
  if (!peers.length) return put("exchange-table", element("p", "Nobody has exchanged anything in the last rounds.", { class: "hint" }));
  const most = Math.max(1, ...parts.flat());
  const columns = [["From", (row) => row.name, "name"]].concat(
    peers.map((name, n) => [
      `to ${name.length > 12 ? `${name.slice(0, 11)}…` : name}`,
      (row) => row.parts[n],
      "number",
      (row, cell, value) => {
        cell.textContent = peers[n] === row.name && !value ? "" : value;
        cell.classList.add("heat");
        cell.style.setProperty("--heat", value / most);
      },
    ]),
  );
  put("exchange-table", table(columns, peers.map((name, n) => ({ name, parts: parts[n] }))));
}
const creditColumns = [
  ["Name", "name", "name"],
  ["Peer", (row) => row.peer_id.slice(-8), ""],
  ["Tokens", (row) => short(row.tokens), "number"],
  ["Share", (row) => `${(100 * row.share).toFixed(1)} %`, "number"],
  ["Rounds", "rounds", "number"],
  ["Uptime", (row) => percent(row.uptime), "number"],
  ["Sealed", "sealed", "number"],
  ["Parts", "parts_reduced", "number"],
  ["Owed", "parts_owed", "number"],
  ["First", "first_round", "number"],
  ["Last", "last_round", "number"],
];
async function drawCredit() {
  $("credit-of").textContent = "counting …";
  try {
    const credit = await ask("/api/credit");
    const since = credit.complete ? "all of the run" : "not from its beginning on";
    $("credit-of").textContent = `From the seals of rounds ${whole(credit.first_round)} to ${whole(credit.last_round)}: ${since}.`;
    put("credit-table", table(creditColumns, credit.peers));
  } catch (error) {
    $("credit-of").textContent = error.message;
  }
}
async function drawManifest() {
  const rows = [];
  const flatten = (value, before) => {
    for (const [key, one] of Object.entries(value))
      if (one && typeof one === "object" && !Array.isArray(one)) flatten(one, `${before}${key}.`);
      else rows.push({ key: before + key, value: Array.isArray(one) ? one.map((x) => (typeof x === "object" ? JSON.stringify(x) : x)).join(", ") : String(one) });
  };
  try {
    flatten((await ask("/api/manifest")).manifest, "");
    put("manifest-table", table([["Key", "key", ""], ["Value", "value", "wide"]], rows));
  } catch (error) {
    put("manifest-table", element("p", error.message, { class: "hint" }));
  }
}
let wanted = 0;
async function drawPast() {
  const slider = $("slider");
  const { span: rounds } = await ask("/api/past");
  document.body.dataset.past = rounds ? "known" : "none";
  if (!rounds) return;
  const first = slider.disabled;
  slider.min = rounds[0];
  slider.max = rounds[1];
  slider.disabled = false;
  if (first) slider.value = rounds[1];
  await drawMoment();
}
async function drawMoment() {
  const number = (wanted = Number($("slider").value));
  $("past-round").textContent = whole(number);
  $("slider").setAttribute("aria-valuetext", `round ${number}`);
  let then;
  try {
    then = await ask(`/api/past?round=${number}`);
  } catch (error) {
    return drawHealth("past-health", { level: "warn", text: error.message });
  }
  if (number !== wanted) return;
  drawHealth("past-health", { level: then.health.level, text: `${new Date(1000 * then.time).toLocaleString()}: ${then.health.text}` });
  put("past-peers", table(peerColumns.filter((column) => !["Exchange", "Compute"].includes(column[0])), then.peers));
  put("past-rounds", table(roundColumns, then.rounds.slice(0, 12)));
}

const drawn = { overview: drawOverview, peers: drawPeers, rounds: drawRounds, exchange: drawExchange };
const fetched = { credit: drawCredit, manifest: drawManifest, past: () => drawPast().catch((error) => ($("past-health").textContent = error.message)) };
function select(name, focus) {
  view = tabs.some((tab) => tab.getAttribute("aria-controls") === name) ? name : "overview";
  for (const tab of tabs) {
    const chosen = tab.getAttribute("aria-controls") === view;
    tab.setAttribute("aria-selected", chosen);
    tab.tabIndex = chosen ? 0 : -1;
    $(tab.getAttribute("aria-controls")).hidden = !chosen;
    if (chosen && focus) tab.focus();
  }
  params.set("view", view);
  history.replaceState(null, "", `#${params}`);
  if (drawn[view]) seen && drawn[view]();
  else fetched[view]();
}
for (const tab of tabs) tab.addEventListener("click", () => select(tab.getAttribute("aria-controls")));
$("tabs").addEventListener("keydown", (event) => {
  const at = tabs.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[event.key];
  if (at < 0 || to === undefined) return;
  event.preventDefault();
  select(tabs[(to + tabs.length) % tabs.length].getAttribute("aria-controls"), true);
});
$("count").addEventListener("click", drawCredit);
$("slider").addEventListener("input", drawMoment);
addEventListener("resize", drawCharts);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);

let heardAt = 0;
function take(look) {
  heardAt = Date.now();
  seen = look;
  $("name").textContent = seen.run.name;
  document.title = `${seen.health.level === "ok" ? "" : "! "}${seen.run.name} – p2ptrain`;
  const { nodes_alive: alive, nodes_dead: dead } = seen.dht;
  const nodes = alive + dead ? `DHT: ${alive} nodes answer${dead ? `, ${dead} do not` : ""}` : "";
  // What a home saw last may be long ago.
  const when = Date.now() / 1000 - seen.time > 60 ? `as it was on ${new Date(1000 * seen.time).toLocaleString()}` : "";
  $("run").textContent = [`run ${seen.run.id.slice(0, 16)}`, `state ${seen.run.state_id.slice(0, 8)}`, nodes, when].filter(Boolean).join(", ");
  drawHealth("health", seen.health);
  live.time.push(seen.time);
  live.loss.push(seen.overview.train_loss);
  live.speed.push(seen.overview.tokens_per_second);
  if (live.time.length > 1800) Object.values(live).forEach((list) => list.shift());
  drawn[view]?.();
  document.body.dataset.drawn = "yes";
}
const stream = new EventSource(`/api/events${token ? `?token=${encodeURIComponent(token)}` : ""}`);
stream.addEventListener("look", (event) => take(JSON.parse(event.data)));
setInterval(() => {
  if (heardAt && Date.now() - heardAt > 15000)
    drawHealth("health", { level: "fail", text: `nothing new for ${Math.round((Date.now() - heardAt) / 1000)} s: is p2ptrain dashboard still running?` });
}, 2000);
async function takeCurves() {
  try {
    curves = await ask("/api/history");
    drawCharts();
  } catch {
    // Without the past of a home the curves begin now.
  }
}
takeCurves();
setInterval(takeCurves, 30000);
select(view);
