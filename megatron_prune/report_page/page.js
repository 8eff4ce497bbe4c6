"use strict";
(() => {
  const root = document.documentElement;
  window.addEventListener("error", (event) => { root.dataset.error = event.message; });
  const data = JSON.parse(document.getElementById("data").textContent);
  const SUFFIXES = [[1e9, "B"], [1e6, "M"], [1e3, "k"]];
  const escaped = (text) => String(text).replace(/[&<>"]/g, (c) => `&#${c.charCodeAt(0)};`);
  const colour = (number) => `var(--c${number})`;
  const trimmed = (value, digits) => String(Number(value.toPrecision(digits)));

  function count(value, digits = 4) {
    const found = SUFFIXES.find(([size]) => Math.abs(value) >= size);
    return found ? trimmed(value / found[0], digits) + found[1] : trimmed(value, digits);
  }
  function power(value) {
    if (value === 0) return "0";
    const [digits, exponent] = value.toExponential(3).split("e");
    return `${Number(Number(digits).toPrecision(3))}e${Number(exponent)}`;
  }
  const FORMATS = { count, power, fixed: (value) => trimmed(value, 4), share: (value) => `${trimmed(100 * value, 3)}%` };
  /* A value under the pointer is told in full where that is short. */
  const exact = (format, value) =>
    format === "count" ? Math.round(value).toLocaleString("en-US") : FORMATS[format](value);

  /* Ticks at 1, 2 or 5 times a power of ten. */
  function ticks(low, high, wanted) {
    const raw = (high - low) / wanted, size = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((factor) => factor * size).find((one) => one >= raw * 0.999);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9); at * step <= high * (1 + 1e-9); at += 1) found.push(at * step);
    return found;
  }
  function logTicks(low, high) {
    const found = [];
    for (let exponent = Math.floor(Math.log10(low)); exponent <= Math.ceil(Math.log10(high)); exponent += 1) {
      for (const factor of [1, 2, 5]) {
        const value = factor * 10 ** exponent;
        if (value >= low * 0.999 && value <= high * 1.001) found.push({ value, main: factor === 1 });
      }
    }
    const mains = found.filter((tick) => tick.main);
    const few = mains.length >= 3 ? mains : found;
    return few.length >= 3 ? few.map((tick) => tick.value) : ticks(low, high, 5);
  }
  function range(chart) {
    let low = Infinity, high = -Infinity;
    for (const curve of chart.curves) for (const value of curve.y) {
      if (value !== null) { low = Math.min(low, value); high = Math.max(high, value); }
    }
    if (chart.log) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
    if (chart.zero) return [0, high > 0 ? high * 1.06 : 1];
    const room = high === low ? Math.abs(high) / 10 || 1 : (high - low) * 0.06;
    return [low - room, high + room];
  }
  function scale(chart, width, height, left) {
    const [low, high] = range(chart), warp = chart.log ? Math.log10 : (value) => value;
    const bottom = height - 40, top = 8, right = width - 10, span = warp(high) - warp(low);
    return {
      low, high, left, right, top, bottom,
      x: (tokens) => left + (tokens / chart.end) * (right - left),
      y: (value) => bottom - ((warp(value) - warp(low)) / span) * (bottom - top),
    };
  }
  function path(curve, at) {
    let text = "", down = false, previous = 0;
    curve.x.forEach((tokens, place) => {
      const value = curve.y[place];
      if (value === null) { down = false; return; }
      const x = at.x(tokens).toFixed(1), y = at.y(value).toFixed(1);
      if (down && curve.style === "step") text += `L${x},${previous}`;
      text += `${down ? "L" : "M"}${x},${y}`;
      down = true;
      previous = y;
    });
    return text;
  }
  function strokes(curve) {
    const dash = { level: "5 4", dashed: "7 3", dotted: "2 3" }[curve.style];
    const look = `stroke="${colour(curve.colour)}" fill="none" stroke-linejoin="round"`;
    return `${look} stroke-width="${curve.style === "faint" ? 1 : 1.8}"` +
      (curve.style === "faint" ? ' opacity="0.4"' : "") + (dash ? ` stroke-dasharray="${dash}"` : "");
  }
  function curveMarkup(curve, at) {
    let text = `<path d="${path(curve, at)}" ${strokes(curve)}/>`;
    /* A lone point has no line; validations are few and each is one. */
    if (curve.style === "points" || curve.y.filter((value) => value !== null).length === 1) {
      curve.y.forEach((value, place) => {
        if (value === null) return;
        const where = `cx="${at.x(curve.x[place]).toFixed(1)}" cy="${at.y(value).toFixed(1)}"`;
        text += `<circle ${where} r="3.2" fill="${colour(curve.colour)}"/>`;
      });
    }
    return text;
  }
  function key(chart) {
    const items = chart.curves.length > 1 ? chart.curves.map((curve) =>
      `<span><svg viewBox="0 0 22 10"><path d="M0,5L22,5" ${strokes(curve)}/>` +
      (curve.style === "points" ? `<circle cx="11" cy="5" r="3.2" fill="${colour(curve.colour)}"/>` : "") +
      `</svg>${escaped(curve.name)}</span>`) : [];
    if (chart.mark !== null) {
      items.push('<span><svg viewBox="0 0 22 10"><path class="mark" d="M11,0L11,10"/></svg>end of pruning</span>');
    }
    return `<div class="key"><span>${escaped(chart.unit)}</span>${items.join("")}</div>`;
  }
  function drawChart(chart) {
    const section = document.getElementById(chart.id), box = section.querySelector(".drawing");
    const width = box.clientWidth, height = section.classList.contains("wide") ? 300 : 220;
    const [low, high] = range(chart), format = FORMATS[chart.format];
    const marks = chart.log ? logTicks(low, high) : ticks(low, high, 5);
    const labels = marks.map((value) => format(value));
    const left = 14 + 7 * Math.max(...labels.map((label) => label.length), 2);
    const at = scale(chart, width, height, left);
    let text = "";
    marks.forEach((value, place) => {
      const y = at.y(value).toFixed(1);
      text += `<path class="grid" d="M${left},${y}L${at.right},${y}"/>` +
        `<text x="${left - 8}" y="${y}" dy="4" text-anchor="end">${labels[place]}</text>`;
    });
    for (const tokens of ticks(0, chart.end, Math.max(2, Math.floor(width / 110)))) {
      const x = at.x(tokens).toFixed(1);
      text += `<path class="axis" d="M${x},${at.bottom}L${x},${at.bottom + 4}"/>` +
        `<text x="${x}" y="${at.bottom + 18}" text-anchor="middle">${count(tokens)}</text>`;
    }
    text += `<path class="axis" d="M${left},${at.bottom}L${at.right},${at.bottom}"/>` +
      `<text x="${(left + at.right) / 2}" y="${height - 4}" text-anchor="middle">training tokens</text>`;
    if (chart.mark !== null) text += `<path class="mark" d="M${at.x(chart.mark)},${at.top}L${at.x(chart.mark)},${at.bottom}"/>`;
    for (const curve of chart.curves) text += curveMarkup(curve, at);
    box.innerHTML = `${key(chart)}<svg role="img" aria-label="${escaped(chart.title)}" height="${height}" ` +
      `viewBox="0 0 ${width} ${height}">${text}<path class="cross" d=""/></svg>`;
    hover(box, box.querySelector("svg[role]"), (x) => chartTip(chart, at, x));
  }
  /* The last point at or before the pointer for steps, the nearest one otherwise. */
  function placeOf(curve, tokens) {
    let low = 0, high = curve.x.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (curve.x[middle] <= tokens) low = middle; else high = middle - 1;
    }
    const next = low + 1;
    const nearer = next < curve.x.length && curve.x[next] - tokens < tokens - curve.x[low];
    return curve.style !== "step" && nearer ? next : low;
  }
  function chartTip(chart, at, x) {
    const tokens = Math.min(chart.end, Math.max(0, ((x - at.left) / (at.right - at.left)) * chart.end));
    const rows = chart.curves.map((curve) => {
      if (!curve.x.length) return "";
      const value = curve.y[placeOf(curve, tokens)];
      const shown = value === null ? "no value" : exact(chart.format, value);
      return `<br><i style="background:${colour(curve.colour)}"></i>${escaped(curve.name)} <b>${shown}</b>`;
    });
    return { line: `M${at.x(tokens)},${at.top}L${at.x(tokens)},${at.bottom}`, html: `at ${count(tokens)} tokens${rows.join("")}` };
  }
  function hover(box, svg, tell) {
    const tip = document.createElement("div");
    tip.className = "tip";
    tip.hidden = true;
    box.append(tip);
    const show = (event) => {
      const frame = box.getBoundingClientRect(), x = event.clientX - frame.left, y = event.clientY - frame.top;
      const told = tell(x, event.clientY - svg.getBoundingClientRect().top);
      tip.hidden = told === null;
      if (told === null) return;
      tip.innerHTML = told.html;
      const cross = svg.querySelector(".cross");
      if (cross) cross.setAttribute("d", told.line);
      const after = x + 16 + tip.offsetWidth < frame.width;
      tip.style.left = `${after ? x + 16 : Math.max(0, x - 16 - tip.offsetWidth)}px`;
      tip.style.top = `${Math.max(0, y - tip.offsetHeight - 10)}px`;
    };
    svg.addEventListener("pointermove", show);
    svg.addEventListener("pointerdown", show);
    svg.addEventListener("pointerleave", () => {
      tip.hidden = true;
      const cross = svg.querySelector(".cross");
      if (cross) cross.setAttribute("d", "");
    });
  }
  const gone = (share) => `rgb(var(--gone-r) var(--gone-g) var(--gone-b) / ${Math.round(share * 100)}%)`;
  function mapKey(map, binned) {
    const ramp = `<svg class="ramp" style="width:90px;background:linear-gradient(to right,${gone(0.25)},${gone(1)})"></svg>`;
    const kept = '<svg viewBox="0 0 12 10" style="width:12px"><rect width="12" height="10" rx="2" fill="var(--kept)"/></svg>';
    const meaning = binned ? `few ${ramp} all removed` :
      `removed early ${ramp} late (step ${map.last.toLocaleString("en-US")})`;
    const cell = binned ? `<span>a cell is up to ${Math.max(...widths(map))} ${map.unit}s</span>` : "";
    return `<div class="key"><span>${kept}kept</span><span>${meaning}</span>${cell}</div>`;
  }
  const widths = (map) => map.bounds.slice(1).map((end, place) => end - map.bounds[place]);
  function drawMap(map) {
    const box = document.getElementById(map.id).querySelector(".drawing"), width = box.clientWidth;
    const sizes = widths(map), rows = map.removed.length, left = map.has_layers ? 34 : 4, binned = Math.max(...sizes) > 1;
    const cell = Math.min(40, (width - left - 8) / sizes.length);
    const tall = map.has_layers ? Math.max(9, Math.min(24, 520 / rows)) : 28, bottom = rows * tall;
    let text = "";
    map.removed.forEach((line, row) => line.forEach((number, column) => {
      const share = number / sizes[column], when = map.when[row][column];
      const strength = number === 0 ? 0 : binned ? 0.25 + 0.75 * share : 0.25 + 0.75 * (when / Math.max(1, map.last));
      const fill = number === 0 ? "var(--kept)" : gone(strength);
      text += `<rect class="cell" x="${(left + column * cell).toFixed(1)}" y="${row * tall}" width="${cell.toFixed(1)}" ` +
        `height="${tall}" rx="2" style="fill:${fill}"/>`;
    }));
    const every = Math.ceil(14 / tall);
    for (let row = 0; map.has_layers && row < rows; row += every) {
      text += `<text x="${left - 8}" y="${(row + 0.5) * tall}" dy="4" text-anchor="end">${row}</text>`;
    }
    const most = map.bounds[map.bounds.length - 1], per = Math.ceil((16 + 8 * String(most).length) / cell);
    for (let column = 0; column < sizes.length; column += per) {
      text += `<text x="${left + (column + 0.5) * cell}" y="${bottom + 16}" text-anchor="middle">${map.bounds[column]}</text>`;
    }
    const what = `${map.unit} of the source, 0 to ${most - 1}` + (map.has_layers ? "; a row is a layer" : "");
    text += `<text x="${left}" y="${bottom + 34}">${what}</text>`;
    box.innerHTML = `${mapKey(map, binned)}<svg role="img" aria-label="${escaped(map.title)}" height="${bottom + 40}" ` +
      `viewBox="0 0 ${width} ${bottom + 40}">${text}</svg>`;
    hover(box, box.querySelector("svg[role]"), (x, y) => mapTip(map, sizes, Math.floor((x - left) / cell), Math.floor(y / tall)));
  }
  function mapTip(map, sizes, column, row) {
    if (!(column >= 0 && column < sizes.length && row >= 0 && row < map.removed.length)) return null;
    const first = map.bounds[column], end = map.bounds[column + 1] - 1, number = map.removed[row][column];
    const where = (map.has_layers ? `layer ${row}, ` : "") + `${map.unit}${end > first ? `s ${first} to ${end}` : ` ${first}`}`;
    const when = map.when[row][column], size = sizes[column];
    const fate = number === 0 ? "kept" : size === 1 ? "removed" : `${number} of ${size} removed`;
    const at = number === 0 ? "" : `, ${size === 1 ? "at" : "the last at"} step ${when.toLocaleString("en-US")}`;
    return { html: `${where}<br><b>${fate}</b>${at}`, line: "" };
  }
  function draw() {
    data.charts.forEach(drawChart);
    data.maps.forEach(drawMap);
    root.dataset.drawn = String(data.charts.length + data.maps.length);
  }
  draw();
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (window.innerWidth !== width) { width = window.innerWidth; draw(); }
  });
  /* A page that loads itself again stays where its reader is. */
  const place = `scroll ${location.pathname}`;
  try {
    window.scrollTo(0, Number(sessionStorage.getItem(place) || 0));
    window.addEventListener("pagehide", () => sessionStorage.setItem(place, String(window.scrollY)));
  } catch (refused) { root.dataset.scroll = "not kept"; }
})();
