"use strict";
// Tooltip: over a chart the nearest point, over a strip the text of the cell.
const tip = document.getElementById("tip");

// Characters that a browser acts on, such as those that turn text around, as \u{202e}. The page fills in which.
const visible = (text) => text.replace(/[ACTIVE]/gu, (c) => `\\u{${c.codePointAt(0).toString(16)}}`);

function show(event, fill) {
  tip.replaceChildren();
  fill(tip);
  tip.hidden = false;
  // Right of and below the pointer if it fits there, else on the other side; never off the page.
  const room = 12, box = tip.getBoundingClientRect();
  let x = event.clientX + room, y = event.clientY + room;
  if (y + box.height > innerHeight) y = event.clientY - box.height - room;
  x = Math.max(6, Math.min(x, innerWidth - box.width - 6));
  tip.style.left = x + "px";
  tip.style.top = Math.max(6, y) + "px";
}

function hide() {
  tip.hidden = true;
  for (const mark of document.querySelectorAll(".here")) mark.remove();
}

for (const chart of document.querySelectorAll("svg.chart")) {
  const source = chart.nextElementSibling;
  if (!source || source.type !== "application/json") continue;
  const points = JSON.parse(source.textContent);
  const dot = document.createElementNS(chart.namespaceURI, "circle");
  dot.setAttribute("class", "here");
  dot.setAttribute("r", "3.5");
  const point = (event) => {
    const box = chart.getBoundingClientRect(), scale = chart.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
    let best = points[0], least = Infinity;
    for (const candidate of points) {
      // Across counts for more: of several lines the nearest at this x.
      const far = Math.abs(candidate[0] - x) * 10 + Math.abs(candidate[1] - y);
      if (far < least) [best, least] = [candidate, far];
    }
    dot.setAttribute("cx", best[0]);
    dot.setAttribute("cy", best[1]);
    chart.append(dot);
    show(event, (into) => into.append(visible(best[2])));
  };
  chart.addEventListener("pointermove", point);
  chart.addEventListener("pointerdown", point);
  chart.addEventListener("pointerleave", hide);
}

// Offsets are in bytes of UTF-8.
const decoder = new TextDecoder(), encoder = new TextEncoder();
const source = document.getElementById("files");
const files = source ? JSON.parse(source.textContent) : [];

function cell(file, number, event) {
  let from = 0;
  for (let at = 0; at < number; at++) from += file.cells[at][0];
  const to = from + file.cells[number][0], log = file.cells[number][1];
  file.bytes ??= encoder.encode(file.text);
  show(event, (into) => {
    const p = log === null ? "not measured" : log > -4 ? (10 ** log).toFixed(4) : "1e" + log.toFixed(1);
    const title = document.createElement("b");
    title.textContent = `${visible(file.path)}, bytes ${from} to ${to}, p_z ${p}`;
    const text = document.createElement("pre");
    let at = from;
    const add = (element, end) => {
      element.textContent = visible(decoder.decode(file.bytes.subarray(at, end)));
      text.append(element);
      at = end;
    };
    for (const [begin, end] of file.wrong) {
      if (end <= from || begin >= to) continue;
      add(document.createElement("span"), Math.max(begin, from));
      add(document.createElement("mark"), Math.min(end, to));
    }
    add(document.createElement("span"), to);
    into.append(title, text);
  });
}

for (const strip of document.querySelectorAll("svg[data-file]")) {
  const file = files[Number(strip.dataset.file)];
  if (!file || file.cells.length === 0) continue;
  let here = 0;
  const point = (event) => {
    const box = strip.getBoundingClientRect();
    const all = file.cells.reduce((sum, [bytes]) => sum + bytes, 0);
    let left = Math.max(0, (event.clientX - box.left) / box.width) * all;
    here = 0;
    while (here + 1 < file.cells.length && left >= file.cells[here][0]) left -= file.cells[here++][0];
    cell(file, here, event);
  };
  strip.addEventListener("pointermove", point);
  strip.addEventListener("pointerdown", point);
  strip.addEventListener("pointerleave", hide);
  strip.addEventListener("blur", hide);
  strip.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") hide();
    if (!by) return;
    event.preventDefault();
    here = Math.max(0, Math.min(file.cells.length - 1, here + by));
    const box = strip.getBoundingClientRect();
    cell(file, here, { clientX: box.left, clientY: box.bottom });
  });
}
addEventListener("scroll", hide, { passive: true });
