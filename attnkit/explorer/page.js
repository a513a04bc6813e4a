"use strict";
// The page around the picture: tabs, tables, the facts of a cell, and the command for another mask.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);

/** An element with text or children; nothing of the data is ever read as HTML. */
function make(name, content = "", attributes = {}) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...(Array.isArray(content) ? content : [String(content)]));
  return made;
}

function listed(list, pairs) {
  list.replaceChildren(...pairs.flatMap(([label, text]) => [make("dt", label), make("dd", text)]));
}

const state = { view: 0, batch: 0, head: 0, rank: 0, pass: "forward" };

function matrixOf({ view, batch, head }) {
  const kind = data.kind === "ranks" ? Ranks : Calls;
  return new kind(data, view, batch, head);
}

// -- the cell --------------------------------------------------------------------------------

function tellCell(i, j, aloud) {
  const facts = [...plot.matrix.tell(i, j)];
  $("cell-title").textContent = `Query ${told(i)}, key ${told(j)}`;
  listed($("cell-facts"), facts);
  if (aloud) $("said").textContent = `Query ${i}, key ${j}. ${facts.map((pair) => pair.join(": ")).join(". ")}`;
  if (data.kind === "ranks") showRank(plot.matrix.rankOf(i));
}

const plot = new Plot($("canvas"), tellCell);

// -- what is shown ---------------------------------------------------------------------------

function choices(id, every) {
  const select = $(id);
  select.replaceChildren(...every.map(([value, text]) => make("option", text, { value })));
  $(`${id}-label`).hidden = every.length < 2;
  select.addEventListener("change", () => {
    state[id] = select.value === "all" ? "all" : Number(select.value);
    show();
  });
  state[id] = every.length ? every[0][0] : 0;
}

function showTabs() {
  const tabs = data.views.map((view, n) => {
    const parts = [make("span", n ? view.label : data.kind === "ranks" ? view.label : "This plan")];
    if (view.price) parts.push(make("small", view.price));
    const tab = make("button", parts, { type: "button", role: "tab", id: `tab-${n}`, "aria-controls": "view" });
    tab.addEventListener("click", () => choose(n));
    return tab;
  });
  function choose(n) {
    state.view = n;
    tabs.forEach((tab, k) => {
      tab.setAttribute("aria-selected", String(k === n));
      tab.tabIndex = k === n ? 0 : -1;
    });
    $("view").setAttribute("aria-labelledby", `tab-${n}`);
    show();
  }
  $("tabs").replaceChildren(...tabs);
  $("tabs").addEventListener("keydown", (event) => {
    const way = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const to = event.key === "Home" ? 0 : event.key === "End" ? tabs.length - 1 : way && (state.view + way + tabs.length) % tabs.length;
    if (to === undefined) return;
    event.preventDefault();
    choose(to);
    tabs[to].focus();
  });
  choose(0);
}

function notes(view) {
  const [left, every] = data.left_out, some = [];
  if (data.note && !state.view) some.push(data.note);
  if (data.kind === "ranks" && state.view) some.push("Of a rival only the price is known: drawn are the ranks of the plan itself.");
  if (left) some.push(`Of ${plural(every, data.packed ? "sequence" : "kind")} of score matrices the page has the first ${told(every - left)}: more would make it too large.`);
  if (view.calls.length && view.calls.some((call) => !call.patches)) some.push("The cells of these calls were left out: the page would be too large. Drawn is what the mask allows.");
  if (view.calls.some((call) => call.opaque)) some.push("The mask is no union of slices: the call is given an entry for each cell.");
  if (data.allowed.some((patch) => !patch[7])) some.push("Which cells are allowed is known only when the mask is read; drawn are all that may be.");
  return some;
}

function show() {
  const view = data.views[state.view], matrix = matrixOf(state), chosen = plot.cell;
  $("headline").textContent = view.title;
  const some = notes(view);
  $("note").textContent = some.join(" ");
  $("note").hidden = !some.length;
  $("canvas").setAttribute("aria-label", `Score matrix of ${plural(matrix.sizes[0], "query").replace("querys", "queries")} and ${plural(matrix.sizes[1], "key")}`);
  plot.show(matrix);
  if (chosen && plot.cell) tellCell(...chosen, false);
  if (!plot.cell) {
    const [rows, keys] = matrix.sizes;
    $("cell-title").textContent = rows && keys ? "Point at a cell" : "No cells";
    listed($("cell-facts"), [["score matrix", `${told(rows)} queries x ${told(keys)} keys`], ...data.facts]);
  }
  $("legend").replaceChildren(...[...matrix.legend()].map(([colour, text]) => {
    const box = make("span", "", { class: "box", "aria-hidden": "true" });
    if (colour) box.style.backgroundColor = css(colour);
    return make("li", colour ? [box, text] : [text]);
  }));
  showCalls(view);
}

function showCalls(view) {
  $("calls-title").textContent = data.kind === "ranks" ? "Price" : view.calls.length === 1 ? "The call" : `${view.calls.length} calls`;
  $("calls-section").hidden = !view.calls.length && !view.items.length;
  listed($("price"), view.items);
  $("calls").replaceChildren(...view.calls.map((call, n) => {
    const rows = call.arguments.map(([name, value]) => make("tr", [make("th", name, { scope: "row" }), make("td", value)]));
    const box = make("span", "", { class: "box", "aria-hidden": "true" });
    box.style.backgroundColor = css(COLOURS[n % COLOURS.length]);
    const title = `${view.calls.length > 1 ? `call ${n + 1}: ` : ""}${call.label}`;
    const told = call.sequences > 1 ? `, ${plural(call.sequences, "sequence")}` : "";
    const summary = make("summary", [box, make("b", title), ` ${call.op}${told}`]);
    const details = make("details", [summary, make("p", `Allows a cell by ${call.reads}.`), make("div", [make("table", rows)], { class: "wide", tabindex: "0", role: "region", "aria-label": `Arguments of ${title}` })]);
    details.open = n < 2;
    return details;
  }));
}

// -- ranks -----------------------------------------------------------------------------------

function bytes(count) {
  const power = Math.min(4, count < 1000 ? 0 : Math.floor(Math.log10(count) / 3));
  return `${Number((count / 1000 ** power).toPrecision(3))} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

function showRank(rank) {
  if (!data.ranks.stages || rank >= data.ranks.stages.length) return;
  state.rank = rank;
  $("rank").value = String(rank);
  const pairs = (some) => some.map(([other, count]) => `${told(count)} ${count === 1 ? "key" : "keys"}: rank ${other}`).join("; ") || "nothing";
  const head = make("tr", ["stage", "computes over", "receives", "sends"].map((name) => make("th", name, { scope: "col" })));
  const rows = data.ranks.stages[rank].map(([number, keys, receives, sends]) => make("tr", [
    make("th", number, { scope: "row" }), make("td", plural(keys, "key")), make("td", pairs(receives)), make("td", pairs(sends)),
  ]));
  $("stages").replaceChildren(make("thead", [head]), make("tbody", rows));
}

function showTransfers() {
  const { names } = data.ranks, table = data.ranks[state.pass];
  for (const id of ["forward", "backward"]) $(id).setAttribute("aria-pressed", String(id === state.pass));
  const most = Math.max(1, ...table.flat()), each = names.map((_, n) => table.reduce((sum, row) => sum + row[n], 0));
  const cell = (count) => {
    const made = make("td", count ? bytes(count) : "0", count ? {} : { class: "none" });
    if (count) made.style.setProperty("--share", String(Math.round((100 * count) / most)));
    return made;
  };
  const head = make("tr", [make("th", "from \\ to", { scope: "col" }), ...names.map((name) => make("th", name, { scope: "col" }))]);
  const rows = table.map((row, n) => make("tr", [make("th", names[n], { scope: "row" }), ...row.map(cell)]));
  const sums = make("tr", [make("th", "received", { scope: "row" }), ...each.map((sum) => make("td", bytes(sum)))]);
  $("transfers").replaceChildren(make("thead", [head]), make("tbody", rows), make("tfoot", [sums]));
}

function showRanks() {
  $("ranks").hidden = false;
  const told = data.ranks.stages || [];
  $("rank").replaceChildren(...told.map((_, n) => make("option", `rank ${n}`, { value: String(n) })));
  $("rank").addEventListener("change", () => showRank(Number($("rank").value)));
  for (const id of ["forward", "backward"]) {
    $(id).addEventListener("click", () => {
      state.pass = id;
      showTransfers();
    });
  }
  showRank(0);
  showTransfers();
}

// -- another mask ----------------------------------------------------------------------------

function quoted(text) {
  return /^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`;
}

function showCommand() {
  $("unsaid").hidden = !data.unsaid.length;
  $("unsaid").textContent = `It does not say ${data.unsaid.join(", ")}: put that into a file, and add --config FILE.`;
  const text = $("text").value.replace(/\s+/g, " ").trim(); // masks are read from one line
  const words = [...data.command, "--mask", text];
  $("command").textContent = words.map(quoted).join(" ");
  $("copied").textContent = "";
}

async function copy() {
  const text = $("command").textContent;
  try {
    await navigator.clipboard.writeText(text);
    $("copied").textContent = "copied";
  } catch {
    // Files have no clipboard in some browsers: the text is chosen, and a key copies it.
    getSelection().selectAllChildren($("command"));
    $("copied").textContent = document.execCommand("copy") ? "copied" : "chosen: copy it with the keyboard";
  }
}

// -- start -----------------------------------------------------------------------------------

function showRefusals() {
  const some = data.refusals, list = $("refused");
  list.hidden = !some.length;
  list.querySelector("summary").textContent = `${plural(some.length, "refusal")}: what was not taken, and why`;
  list.querySelector("ul").replaceChildren(...some.map(([subject, reason, code]) => make("li", [make("b", subject), `: ${reason} `, make("code", code)])));
}

function start() {
  const whole = data.packed && data.batches.length === data.sizes.length;
  choices("batch", [...(whole && data.batches.length > 1 ? [["all", "all sequences"]] : []), ...(data.kind === "ranks" && data.packed ? [] : data.batches)]);
  choices("head", data.heads);
  for (const [id, act] of [["in", () => plot.zoom(1.6)], ["out", () => plot.zoom(1 / 1.6)], ["fit", () => plot.fit()], ["cells", () => plot.toCells()]]) {
    $(id).addEventListener("click", act);
  }
  $("text").value = data.mask;
  $("text").addEventListener("input", showCommand);
  $("copy").addEventListener("click", copy);
  $("report").querySelector("pre").textContent = data.report;
  if (data.kind === "ranks") showRanks();
  showRefusals();
  showCommand();
  showTabs();
}

start();
window.explorer = { data, plot, state, matrixOf };
