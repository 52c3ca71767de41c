// What is drawn: small charts, and text in the colours of those who wrote it.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

function shape(name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

function canvas(width, height, label) {
  return shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
}

const percent = (share) => `${Math.round(100 * share)}%`;
const count = (number) => Math.round(number).toLocaleString("en");
const plural = (number, what) => `${count(number)} ${what}${number === 1 ? "" : "s"}`;
const speed = (rate) => (rate >= 20 ? count(rate) : rate.toFixed(1));

// The latest rounds, each a column of its proposals.
function drawRounds(into, rounds, classOf) {
  const [width, height, wide] = [336, 60, 6];
  const shown = rounds.slice(-Math.floor(width / wide));
  const kept = shown.reduce((sum, one) => sum + one.accepted, 0);
  const svg = canvas(width, height, `The latest ${shown.length} rounds kept ${kept} proposals.`);
  const most = Math.max(4, ...shown.map((one) => one.drafted));
  const step = Math.min(12, (height - 5) / most);
  shown.forEach(({ source, drafted, accepted }, index) => {
    if (!drafted) return;
    const column = shape("g", { class: `c-${classOf(source)}` });
    for (const [state, tokens] of [["cell", drafted], ["cell kept", accepted]]) {
      const tall = tokens * step;
      const place = { x: index * wide + 0.5, y: height - 3.5 - tall, width: wide - 2, height: tall };
      column.append(shape("rect", { ...place, class: state }));
    }
    svg.append(column);
  });
  svg.append(shape("line", { x1: 0, x2: width, y1: height - 1, y2: height - 1, class: "axis" }));
  into.replaceChildren(svg);
}

// How often each position of a proposal was kept.
function drawPositions(into, drafted, accepted) {
  const places = drafted.map((all, index) => [all, accepted[index]]).filter(([all]) => all > 0);
  if (!places.length) {
    into.replaceChildren(make("p", { class: "note" }, "Nothing was proposed yet."));
    return;
  }
  const bars = make("div", { class: "bars" });
  places.slice(0, 8).forEach(([all, kept], index) => {
    const fill = make("i");
    fill.style.width = percent(kept / all);
    const title = `${count(kept)} of ${count(all)} kept`;
    bars.append(
      make("span", { class: "place" }, String(index + 1)),
      make("span", { class: "bar", title }, fill),
      make("span", { class: "rate" }, percent(kept / all)),
    );
  });
  into.replaceChildren(bars);
}

// What a round of K proposals costs, in plain rounds, beside the tokens that it brings.
function drawCurve(into, costs, brings) {
  const [width, height, left, right, top, bottom] = [336, 168, 22, 60, 10, 24];
  const places = costs.map((cost, k) => [k, cost]).filter(([, cost]) => cost !== null);
  const last = Math.max(...places.map(([k]) => k), brings.length - 1, 1);
  const highest = Math.max(2, ...places.map(([, cost]) => cost), ...brings);
  const x = (k) => left + ((width - left - right) * k) / last;
  const y = (value) => height - bottom - ((height - top - bottom) * value) / highest;
  const best = bestOf(places, brings);
  const svg = canvas(width, height, curveInWords(places, best));
  const every = Math.max(1, Math.ceil(highest / 4));
  for (let value = 0; value <= highest; value += every) {
    svg.append(shape("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "axis" }));
    svg.append(shape("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value));
  }
  for (let k = 0; k <= last; k += Math.ceil(last / 8)) {
    svg.append(shape("text", { x: x(k), y: height - 8, "text-anchor": "middle" }, k));
  }
  svg.append(shape("text", { x: width - right + 10, y: height - 8 }, "proposals"));
  if (best > 0) {
    svg.append(shape("line", { x1: x(best), x2: x(best), y1: top, y2: height - bottom, class: "best" }));
  }
  const lines = [
    ["cost", "dot", places],
    ["brings", "dot-brings", brings.map((value, k) => [k, value])],
  ];
  const ends = [];
  for (const [kind, dot, points] of lines) {
    if (!points.length) continue;
    const path = points.map(([k, value]) => `${x(k)},${y(value)}`).join(" ");
    svg.append(shape("polyline", { points: path, class: kind }));
    for (const [k, value] of points) svg.append(shape("circle", { cx: x(k), cy: y(value), r: 2, class: dot }));
    const value = points.at(-1)[1];
    ends.push({ kind, x: width - right + 8, y: y(value) + 4 });
  }
  if (ends.length === 2 && Math.abs(ends[0].y - ends[1].y) < 14) {
    const upper = ends[0].y <= ends[1].y ? 0 : 1;
    ends[1 - upper].y = ends[upper].y + 14;
  }
  for (const end of ends) {
    const name = end.kind === "cost" ? "costs" : "brings";
    svg.append(shape("text", { x: end.x, y: end.y, class: `label-${end.kind}` }, name));
  }
  into.replaceChildren(svg);
}

function bestOf(places, brings) {
  const rates = places.filter(([k]) => k < brings.length).map(([k, cost]) => [brings[k] / cost, k]);
  return rates.length ? rates.reduce((one, other) => (other[0] > one[0] ? other : one))[1] : 0;
}

function curveInWords(places, best) {
  const told = places.map(([k, cost]) => `${k}: ${cost.toFixed(2)}`).join(", ");
  return `Cost in plain rounds by proposals: ${told}. Best: ${best}.`;
}
