// SPDX-License-Identifier: MIT
// Draws the model of a page.  Text reaches the document by textContent alone; no string is ever parsed as markup.
"use strict";
const ROW = 29, MANY = 120, MARKS = { better: "\u25b2", worse: "\u25bc", equivalent: "\u25a0", open: "\u25cf" };
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 3", "7 3 2 3", "2 3", "11 3", "5 2 2 2 2 2", "1 2"];

function h(tag, options, ...inner) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(options || {})) {
    if (key === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else if (key === "class") node.className = value;
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  for (const part of inner.flat()) if (part != null && part !== "") node.append(part);  // append makes text nodes of text
  return node;
}

function s(tag, options, ...inner) {
  const node = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(options || {})) node.setAttribute(key, value);
  node.append(...inner);
  return node;
}

function fmt(value, form) {
  if (value == null) return "-";
  if (typeof value === "boolean") return value ? "y" : "n";
  if (typeof value !== "number") return value;
  const m = /^(\+?)(#?)(,?)\.(\d+)([gf%])$/.exec(form || "");
  if (!m) return Number.isInteger(value) ? String(value) : String(+value.toPrecision(6));
  const digits = +m[4];
  let text;
  if (m[5] === "%") text = (100 * value).toFixed(digits) + "%";
  else if (m[5] === "f") text = m[3] ? value.toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits }) : value.toFixed(digits);
  else {
    const size = value === 0 ? 0 : Math.floor(Math.log10(Math.abs(value)));
    if (size < -5 || size >= Math.max(digits, 7)) text = value.toExponential(Math.max(0, digits - 1));
    else text = m[2] ? value.toPrecision(Math.max(1, digits)) : String(+value.toPrecision(Math.max(1, digits)));
    if (/e/.test(text) && size >= -5 && size < 7) text = String(+text);
  }
  return (m[1] && value >= 0 ? "+" : "") + text;
}

const order = (a, b) => a == null ? (b == null ? 0 : 1) : b == null ? -1 :
  typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), "en", { numeric: true });

// Tables

function tester(query, columns) {  // words that must all fit: word, -word, column=text, column>number
  const names = columns.map(c => c.name.toLowerCase().replaceAll(" ", "_"));
  return query.toLowerCase().split(/\s+/).filter(Boolean).map(word => {
    const m = /^(.+?)(!=|<=|>=|=|<|>)(.*)$/.exec(word), at = m ? names.indexOf(m[1]) : -1;
    if (at >= 0) return row => {
      const cell = row[at], number = Number(m[3]);
      if (m[2] === "=") return String(cell == null ? "" : cell).toLowerCase() === m[3] || (m[3] !== "" && cell === number);
      if (m[2] === "!=") return String(cell).toLowerCase() !== m[3];
      if (typeof cell !== "number" || m[3] === "" || isNaN(number)) return false;
      return m[2] === "<" ? cell < number : m[2] === ">" ? cell > number : m[2] === "<=" ? cell <= number : cell >= number;
    };
    const no = word.length > 1 && word[0] === "-", wanted = no ? word.slice(1) : word;
    return row => row.some(cell => cell != null && String(cell).toLowerCase().includes(wanted)) !== no;
  });
}

function tableBlock(b) {
  let rows = b.rows, sort = -1, down = false, items = [], group = -1, drawn = "";
  const columns = b.columns, hide = new Set(b.hide || []);
  const shown = columns.map((c, i) => i).filter(i => !hide.has(columns[i].name));
  const numeric = columns.map((c, i) => c.num || rows.some(r => typeof r[i] === "number") && !rows.some(r => typeof r[i] === "string"));
  const mean = columns.findIndex(c => c.name === b.mean);
  const virtual = rows.length > MANY || b.live, wrap = b.wrap && !virtual;
  const filter = b.filter && rows.length > 3 ? h("input", { type: "search", placeholder: "filter: word -word state=done", "aria-label": "filter rows", on: { input: refresh } }) : null;
  const groups = (b.group || []).filter(n => new Set(rows.map(r => r[columns.findIndex(c => c.name === n)])).size > 1);
  const picker = groups.length ? h("select", { "aria-label": "group rows", on: { change: regroup } }, h("option", { value: "-1" }, "no groups"),
    groups.map(n => h("option", { value: columns.findIndex(c => c.name === n) }, n))) : null;
  const count = h("span", { class: "dim", role: "status" });
  const heads = shown.map(i => h("th", { scope: "col", class: numeric[i] ? "num" : "", title: columns[i].name },
    h("button", { type: "button", on: { click: () => sortBy(i) } }, columns[i].name)));
  const body = h("tbody"), box = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": b.name || "table", on: { scroll: draw } });
  const grid = h("table", { class: wrap ? "wrap" : virtual ? "fixed" : shown.length < 5 ? "narrow" : "" });
  if (virtual) {
    const wide = i => Math.min(50, Math.max(columns[i].name.length, ...rows.filter((r, at) => at % Math.ceil(rows.length / 500) === 0).map(r => fmt(r[i], columns[i].format).length), columns[i].wide || 4));
    const widths = shown.map(i => Math.round(wide(i) * 8.2) + 20);
    grid.append(h("colgroup", {}, widths.map(w => h("col", { width: w }))));
    grid.style.minWidth = widths.reduce((a, w) => a + w, 0) + "px";
  }
  grid.append(h("thead", {}, h("tr", {}, heads)), body);
  box.append(grid);

  function sortBy(i) {
    [sort, down] = sort === i ? (down ? [-1, false] : [i, true]) : [i, false];
    heads.forEach((head, at) => {
      const mine = shown[at] === sort;
      head.setAttribute("aria-sort", mine ? (down ? "descending" : "ascending") : "none");
      head.firstChild.textContent = columns[shown[at]].name + (mine ? (down ? " \u2193" : " \u2191") : "");
    });
    refresh();
  }
  function regroup() { group = +picker.value; refresh(); }
  function refresh() {
    const tests = tester(filter ? filter.value : "", columns);
    const kept = rows.filter(row => tests.every(test => test(row)));
    if (sort >= 0) {  // what does not exist stays last either way
      kept.sort((a, c) => a[sort] == null || c[sort] == null ? order(a[sort], c[sort]) : (down ? -1 : 1) * order(a[sort], c[sort]));
    }
    items = kept;
    if (group >= 0) {
      const all = new Map(), seen = new Map();  // a mean is over all rows of the group, whatever the filter hides
      for (const row of rows) all.set(row[group], [...(all.get(row[group]) || []), row]);
      for (const row of kept) seen.set(row[group], [...(seen.get(row[group]) || []), row]);
      items = [...all.keys()].filter(key => seen.has(key)).flatMap(key => [{ key, all: all.get(key), seen: seen.get(key).length }, ...seen.get(key)]);
    }
    count.textContent = (kept.length === rows.length ? `${rows.length} rows` : `${kept.length} of ${rows.length} rows`);
    box.scrollTop = 0;
    drawn = "";
    draw();
  }
  function line(item) {
    if (!Array.isArray(item)) {
      const values = mean < 0 ? [] : item.all.map(r => r[mean]).filter(v => typeof v === "number");
      const total = values.length ? `, mean ${b.mean} ${fmt(values.reduce((a, v) => a + v, 0) / values.length, columns[mean].format)} of all ${values.length} with a value` : "";
      return h("tr", { class: "group" }, h("td", { colspan: shown.length }, `${columns[group].name} ${fmt(item.key)}: ${item.seen} of ${item.all.length} rows shown${total}`));
    }
    return h("tr", {}, shown.map((i, at) => {
      const text = fmt(item[i], columns[i].format);
      const inner = at === 0 && b.link ? h("a", { href: b.link + encodeURIComponent(text) + ".html" }, text) :
        columns[i].name === "share" && typeof item[i] === "number" ? progress(item[i]) : text;
      return h("td", { class: numeric[i] ? "num" : "", title: !wrap && text.length > 30 ? text : null }, inner);
    }));
  }
  function draw() {
    const high = box.clientHeight || 600, room = Math.ceil(high / ROW) + 12;
    const from = virtual ? Math.max(0, Math.min(Math.floor(box.scrollTop / ROW) - 6, items.length - room)) : 0;
    const to = virtual ? Math.min(items.length, from + room) : items.length;
    if (drawn === `${from} ${to}`) return;
    drawn = `${from} ${to}`;
    const gap = n => {  // stands in for the rows that are not drawn
      const cell = h("td", { colspan: shown.length });
      cell.style.height = n * ROW + "px";
      return n ? [h("tr", { "aria-hidden": "true" }, cell)] : [];
    };
    body.replaceChildren(...gap(from), ...items.slice(from, to).map(line), ...gap(items.length - to));
  }
  refresh();
  const node = h("div", {}, filter || picker ? h("div", { class: "tools" }, filter, picker, count) : null,
    b.note ? h("p", { class: "note" }, b.note) : null, box);
  node.update = found => { const at = box.scrollTop; rows = found; refresh(); box.scrollTop = at; draw(); };
  requestAnimationFrame(() => { drawn = ""; draw(); });
  return node;
}

function progress(share) {
  const inside = h("i");
  inside.style.width = Math.round(100 * share) + "%";
  return h("span", {}, h("span", { class: "bar" }, inside), ` ${Math.round(100 * share)}%`);
}

// Verdicts

const kindOf = word => ["better", "worse", "equivalent"].find(k => word.startsWith(k)) || "open";

function mark(kind, x, y, color, size = 5) {
  const z = size, shape = { better: `${x - z},${y + z} ${x + z},${y + z} ${x},${y - z}`, worse: `${x - z},${y - z} ${x + z},${y - z} ${x},${y + z}`,
    equivalent: `${x - z},${y - z} ${x + z},${y - z} ${x + z},${y + z} ${x - z},${y + z}` }[kind];
  return shape ? s("polygon", { points: shape, fill: color }) : s("circle", { cx: x, cy: y, r: z, fill: color });
}

function forestBlock(b) {
  const ends = b.rows.flatMap(r => [r.effect, ...(r.interval || []).slice(0, 2)]).filter(v => v != null);
  const far = Math.max(1e-12, b.margin || 0, ...ends.map(Math.abs)) * 1.12;
  const percent = v => `${50 + 50 * v / far}%`;
  const head = ["contrast", b.unit, "difference, exact interval", "n, p", "verdict"].map(t => h("div", { class: "head" }, t));
  const rows = b.rows.map(r => {
    const kind = kindOf(r.word), color = `var(--${{ better: "good", worse: "bad", equivalent: "same", open: "dim" }[kind]})`;
    const plot = s("svg", { role: "img", "aria-label": `${r.label}: ${fmt(r.effect, "+.3g")}, ${r.word}` });
    if (b.margin) plot.append(s("rect", { x: percent(-b.margin), width: `${100 * b.margin / far}%`, y: 0, height: 34, fill: "var(--band)" }));
    plot.append(s("line", { x1: "50%", x2: "50%", y1: 0, y2: 34, stroke: "var(--dim)", "stroke-width": 1 }));
    if (r.interval) plot.append(s("line", { x1: percent(r.interval[0]), x2: percent(r.interval[1]), y1: 17, y2: 17, stroke: color, "stroke-width": 2 }));
    if (r.effect != null) plot.append(s("svg", { x: percent(r.effect), y: 0, overflow: "visible", width: 1, height: 34 }, mark(kind, 0, 17, color)));
    const spread = r.interval ? `${fmt(r.interval[0], "+.3g")} .. ${fmt(r.interval[1], "+.3g")} (${fmt(r.interval[2], ".1%")})` : "";
    const p = r.p == null ? "" : `p ${fmt(r.p, ".3g")}` + (r.family == null ? "" : `, family ${fmt(r.family, ".3g")}`);
    return h("div", { class: "row" }, h("div", {}, h("b", {}, r.label), " ", h("span", { class: "dim" }, r.title)), h("div", {}, plot),
      h("div", {}, `${fmt(r.effect, "+.4g")}` + (r.percent == null ? "" : ` (${fmt(r.percent, "+.2f")}%)`), h("br"), h("span", { class: "dim" }, spread)),
      h("div", {}, h("details", {}, h("summary", { title: "trials" }, `n=${r.n}`), h("span", { class: "dim" }, r.trials.join(" "))),
        h("span", { class: "dim" }, p)),
      h("div", {}, h("span", { class: "badge " + kind }, MARKS[kind] + " " + r.word), r.note ? h("div", { class: "dim" }, r.note) : null));
  });
  const note = `Scale: ${fmt(-far, ".2g")} .. ${fmt(far, "+.2g")}; line: no difference` + (b.margin ? `; band: margin ${b.margin}` : "") +
    (b.better ? `; ${b.better} ${b.unit.split(" ")[2]} is better` : "") + ". n opens the trials of a row.";
  return h("div", {}, h("div", { class: "forest" }, head, rows), h("p", { class: "note" }, note));
}

// Curves

function ticks(low, high, most) {
  const raw = (high - low) / most || 1, ten = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(m => m * ten).find(v => v >= raw);
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + step * 1e-9; v += step) found.push(+v.toPrecision(12));
  return found;
}

const short = v => Math.abs(v) >= 1e5 || (v !== 0 && Math.abs(v) < 1e-3) ? v.toExponential(1).replace("e+", "e").replace(".0e", "e") : String(+v.toPrecision(4));

function curvesBlock(b) {
  const on = new Set(b.arms.slice(0, b.arms.length > 10 ? 8 : 10).map(a => a.name));
  const metric = h("select", { "aria-label": "metric", on: { change: draw } }, b.metrics.map(n => h("option", { value: n }, n)));
  const axis = h("select", { "aria-label": "x axis", on: { change: draw } }, Object.entries(b.axes).map(([n, t]) => h("option", { value: n }, t)));
  const smooth = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: 0, "aria-label": "smoothing", on: { input: draw } });
  const log = h("input", { type: "checkbox", on: { change: draw } });
  const parts = { 0: "all of it", 0.1: "the last 90 %", 0.5: "the last half" }, first = b.arms.length > 4 ? "0.5" : "0.1";
  const late = h("select", { "aria-label": "y range", on: { change: draw } }, Object.entries(parts).map(([v, t]) => h("option", { value: v, selected: v === first }, t)));
  const bands = h("input", { type: "checkbox", checked: true, on: { change: draw } });
  const several = b.arms.some(a => Object.values(a.series).some(x => x.lo));
  const chart = h("div", { class: "chart" }), tip = h("div", { class: "tip", hidden: true });
  const color = i => `var(--c${i % 7})`;
  const sample = i => s("svg", {}, s("line", { x1: 0, x2: 26, y1: 5, y2: 5, stroke: color(i), "stroke-width": 2, "stroke-dasharray": DASHES[Math.floor(i / 7 + i) % 7] }));
  const keys = b.arms.map((a, i) => h("label", {}, h("input", { type: "checkbox", checked: on.has(a.name), on: { change: e => { e.target.checked ? on.add(a.name) : on.delete(a.name); draw(); } } }), sample(i), a.name));
  const toggle = all => { keys.forEach((k, i) => { k.firstChild.checked = all; all ? on.add(b.arms[i].name) : on.delete(b.arms[i].name); }); draw(); };
  let width = 0;

  function draw() {
    width = chart.clientWidth || 640;
    const W = width, H = Math.max(230, Math.min(400, W * 0.5)), L = 58, R = 12, T = 8, B = 40;
    const name = metric.value, ax = axis.value, weight = +smooth.value;
    const lines = b.arms.map((a, i) => ({ a, i, d: a.series[name] })).filter(o => o.d && on.has(o.a.name)).map(o => {
      const at = o.d.x[ax], xs = Array.isArray(at) ? at : o.d.x.step.map(v => v * at);
      let sum = 0, mass = 0;
      const soft = o.d.y.map(v => {
        if (v == null) return null;
        sum = weight * sum + (1 - weight) * v;
        mass = weight * mass + 1 - weight;
        return sum / mass;
      });
      return { ...o, xs, soft };
    });
    const right = Math.max(...lines.map(o => o.xs[o.xs.length - 1])), start = right * late.value;
    let low = Infinity, high = -Infinity;
    for (const o of lines) o.xs.forEach((x, k) => {
      if (x < start) return;
      for (const v of [o.d.y[k], bands.checked && o.d.lo ? o.d.lo[k] : o.d.y[k], bands.checked && o.d.hi ? o.d.hi[k] : o.d.y[k]])
        if (v != null && (!log.checked || v > 0)) { low = Math.min(low, v); high = Math.max(high, v); }
    });
    chart.replaceChildren(tip);
    if (!(low <= high)) { chart.append(h("p", { class: "dim" }, "Nothing is selected that has this metric.")); return; }
    const f = log.checked ? Math.log10 : v => v, pad = (f(high) - f(low)) * 0.05 || Math.abs(f(high)) * 0.05 || 1;
    const y0 = f(low) - pad, y1 = f(high) + pad, end = right || 1;
    const X = x => L + (W - L - R) * x / end, Y = v => T + (H - T - B) * (y1 - f(v)) / (y1 - y0);
    const svg = s("svg", { viewBox: `0 0 ${W} ${H}`, height: H, role: "img", "aria-label": `${name} over ${ax}` });
    const clip = "clip" + Math.random().toString(36).slice(2);
    svg.append(s("clipPath", { id: clip }, s("rect", { x: L, y: T, width: W - L - R, height: H - T - B })));
    for (const v of ticks(y0, y1, 5)) {
      const y = T + (H - T - B) * (y1 - v) / (y1 - y0);
      svg.append(s("line", { x1: L, x2: W - R, y1: y, y2: y, stroke: "var(--line)", "stroke-width": 0.7 }));
      svg.append(s("text", { x: L - 6, y: y + 4, "text-anchor": "end" }, short(log.checked ? 10 ** v : v)));
    }
    for (const v of ticks(0, end, W < 500 ? 4 : 8)) svg.append(s("text", { x: X(v), y: H - B + 16, "text-anchor": "middle" }, short(v)));
    svg.append(s("text", { x: (L + W - R) / 2, y: H - 6, "text-anchor": "middle" }, b.axes[ax]));
    svg.append(s("text", { x: 12, y: (T + H - B) / 2, "text-anchor": "middle", transform: `rotate(-90 12 ${(T + H - B) / 2})` }, `${name} (${b.units[name]})`));
    const inside = s("g", { "clip-path": `url(#${clip})` });
    const at = v => Math.max(-9999, Math.min(9999, Y(v) || 0)).toFixed(1);  // a gap, y null, starts a new line
    const path = (xs, ys) => xs.map((x, k) => ys[k] == null ? "" : `${k && ys[k - 1] != null ? "L" : "M"}${X(x).toFixed(1)} ${at(ys[k])}`).join("");
    for (const o of lines) if (bands.checked && o.d.lo) {
      inside.append(s("path", { class: "range", d: path(o.xs, o.d.hi) + "L" + path([...o.xs].reverse(), [...o.d.lo].reverse()).slice(1) + "Z", fill: color(o.i), opacity: 0.15 }));
    }
    for (const o of lines) {
      const line = { fill: "none", stroke: color(o.i), "stroke-dasharray": DASHES[Math.floor(o.i / 7 + o.i) % 7] };
      if (weight) inside.append(s("path", { ...line, class: "raw", d: path(o.xs, o.d.y), "stroke-width": 1, opacity: 0.35 }));
      inside.append(s("path", { ...line, class: "curve", d: path(o.xs, weight ? o.soft : o.d.y), "stroke-width": 1.8 }));
      if (o.xs.length === 1) inside.append(s("circle", { cx: X(o.xs[0]), cy: Y(o.d.y[0]), r: 3, fill: color(o.i) }));
    }
    const cursor = s("line", { y1: T, y2: H - B, stroke: "var(--dim)", "stroke-width": 1, visibility: "hidden" });
    svg.append(inside, cursor);
    svg.addEventListener("pointermove", e => hover(e, lines, X, L, R, W, end, cursor, name, ax, weight));
    svg.addEventListener("pointerleave", () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); });
    chart.prepend(svg);
  }
  function hover(e, lines, X, L, R, W, end, cursor, name, ax, weight) {
    const box = chart.getBoundingClientRect(), px = e.clientX - box.left, want = (px - L) / (W - L - R) * end;
    if (px < L || px > W - R) return;
    const near = lines.map(o => {
      let k = o.xs.findIndex(x => x >= want);
      if (k < 0) k = o.xs.length - 1;
      if (k > 0 && want - o.xs[k - 1] < o.xs[k] - want) k -= 1;
      return { o, k, y: o.d.y[k] };
    }).sort((a, c) => a.y - c.y);
    const x = near.reduce((a, c) => Math.abs(c.o.xs[c.k] - want) < Math.abs(a - want) ? c.o.xs[c.k] : a, Infinity);
    cursor.setAttribute("x1", X(x)); cursor.setAttribute("x2", X(x)); cursor.setAttribute("visibility", "visible");
    tip.replaceChildren(h("b", {}, `${ax} ${short(x)}`), ...near.slice(0, 10).map(q => h("div", {}, sample(q.o.i), ` ${q.o.a.name}: ${fmt(q.y, ".5g")}` +
      (q.o.d.lo ? ` (${fmt(q.o.d.lo[q.k], ".4g")} .. ${fmt(q.o.d.hi[q.k], ".4g")}, n=${q.o.d.n})` : "") + (weight ? `, smooth ${fmt(q.o.soft[q.k], ".5g")}` : ""))),
      near.length > 10 ? h("div", { class: "dim" }, `and ${near.length - 10} more`) : "");
    tip.querySelectorAll("svg").forEach(v => { v.setAttribute("width", 20); v.setAttribute("height", 8); v.style.display = "inline-block"; v.style.width = "20px"; });
    tip.hidden = false;
    tip.style.top = "12px";
    tip.style.left = Math.max(0, px < W / 2 ? Math.min(px + 14, W - tip.offsetWidth) : px - 14 - tip.offsetWidth) + "px";
  }
  new ResizeObserver(() => { if (chart.clientWidth && chart.clientWidth !== width) draw(); }).observe(chart);
  const unit = several ? "Median, band from lowest to highest seed. " : "";
  return h("div", {}, h("div", { class: "tools" }, metric, axis, h("label", {}, "smooth", smooth), h("label", {}, log, "log y"),
    h("label", {}, "y fits", late), several ? h("label", {}, bands, "seed bands") : null), chart, b.arms.length > 1 ? h("div", { class: "legend" }, keys) : null,
    b.arms.length > 6 ? h("div", { class: "tools" }, h("button", { type: "button", on: { click: () => toggle(true) } }, "all"), h("button", { type: "button", on: { click: () => toggle(false) } }, "none")) : null,
    h("p", { class: "note" }, unit + "Smoothing is an exponential mean, drawn beside the raw curve; no number elsewhere depends on it."));
}

// Configuration

function configBlock(b) {
  const at = (i, name) => name in b.diffs[i] ? b.diffs[i][name] : (b.base[name] || "");
  const pick = (label, first) => h("select", { "aria-label": label, on: { change: draw } }, b.arms.map((n, i) => h("option", { value: i, selected: i === first }, n)));
  const left = pick("A", 0), right = pick("B", Math.min(1, b.arms.length - 1)), only = h("input", { type: "checkbox", checked: true, on: { change: draw } });
  const words = h("input", { type: "search", placeholder: "symbol", "aria-label": "filter symbols", on: { input: draw } });
  const body = h("tbody"), note = h("p", { class: "note", role: "status" });
  function draw() {
    const [i, j] = [+left.value, +right.value], wanted = words.value.toUpperCase();
    const names = [...new Set([...Object.keys(b.base), ...Object.keys(b.diffs[i]), ...Object.keys(b.diffs[j])])].sort();
    const rows = names.filter(n => (!only.checked || at(i, n) !== at(j, n)) && n.includes(wanted));
    body.replaceChildren(...rows.slice(0, 600).map(n => h("tr", {}, h("td", {}, n), h("td", {}, at(i, n) || "-"), h("td", {}, at(j, n) || "-"))));
    note.textContent = `${rows.length} of ${names.length} symbols` + (rows.length ? "" : ": nothing differs");
  }
  draw();
  return h("div", {}, h("div", { class: "tools" }, h("label", {}, "A", left), h("label", {}, "B", right), h("label", {}, only, "only what differs"), words), note,
    h("div", { class: "scroll", tabindex: "0" }, h("table", { class: "wrap" }, h("thead", {}, h("tr", {}, ["symbol", "A", "B"].map(t => h("th", { scope: "col" }, t)))), body)));
}

// A running campaign

function liveBlock(b) {
  const head = h("div"), states = h("div", { class: "states" }), alerts = h("div"), link = h("span", { class: "dim", role: "status" }, "connecting");
  const rows = tableBlock({ ...b.table, live: true, filter: true });
  const show = data => {
    states.replaceChildren(...Object.entries(data.counts).map(([k, n]) => h("span", {}, h("b", {}, String(n)), k)));
    head.replaceChildren(h("p", {}, h("b", {}, data.eta), " ", h("span", { class: "dim" }, data.basis)));
    alerts.replaceChildren(...data.alerts.map(a => h("div", { class: "alert" }, h("b", {}, "! " + a.kind), ` ${a.trial ? a.trial + ": " : ""}${a.text}`)));
    rows.update(data.rows);
    link.textContent = `updated ${data.at}`;
  };
  show(b.first);
  const source = new EventSource(b.events);
  source.onmessage = e => show(JSON.parse(e.data));
  source.onerror = () => { link.textContent = "no connection to the dashboard; trying again"; };
  return h("div", {}, states, head, alerts, rows, link);
}

// The page

const BLOCKS = { text: b => h("p", {}, b.text), list: b => h("ul", {}, b.items.map(t => h("li", {}, t))), code: b => h("pre", { tabindex: "0" }, b.text),
  links: b => h("p", {}, b.links.flatMap(([t, to]) => [h("a", { href: to }, t), "  "])),
  table: tableBlock, forest: forestBlock, curves: curvesBlock, config: configBlock, live: liveBlock };

function theme() {
  const root = document.documentElement, kinds = ["auto", "light", "dark"];
  const read = () => { try { return localStorage.getItem("ablab-theme") || "auto"; } catch { return "auto"; } };
  const button = h("button", { type: "button", on: { click: () => set(kinds[(kinds.indexOf(button.dataset.kind) + 1) % 3]) } });
  const set = kind => {
    kind === "auto" ? root.removeAttribute("data-theme") : root.setAttribute("data-theme", kind);
    button.dataset.kind = kind;
    button.textContent = "theme: " + kind;
    try { localStorage.setItem("ablab-theme", kind); } catch { /* a file: page may have no storage */ }
  };
  set(read());
  return button;
}

function main() {
  const page = JSON.parse(document.getElementById("data").textContent);
  const name = title => title.toLowerCase().replace(/[^a-z]+/g, "-");
  const top = h("header", {}, h("div", { class: "top" }, h("h1", {}, page.title), theme()),
    page.banners.map(t => h("div", { class: "banner", role: "alert" }, "\u26a0 " + t)), page.up ? h("p", {}, h("a", { href: page.up }, "\u2190 " + (page.back || "the report"))) : null,
    h("p", { class: "lead" }, page.lead), h("ul", { class: "facts" }, page.facts.map(t => h("li", {}, t))),
    h("nav", { "aria-label": "sections" }, page.sections.map(x => h("a", { href: "#" + name(x.title) }, x.title))));
  document.body.append(top, h("main", {}, page.sections.map(x => h("section", { id: name(x.title) }, h("h2", {}, x.title), x.blocks.map(b => BLOCKS[b.type](b))))));
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
}

main();
