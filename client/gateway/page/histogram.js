// A histogram of top bytes: 64 bars, with the height that an even spread would have as a dashed line.

const SVG = "http://www.w3.org/2000/svg";
const BARS = 64;
const WIDTH = 256;
const HEIGHT = 72;

/** An <svg> for 256 counts. */
export function histogram(counts) {
  const bars = Array.from({ length: BARS }, (_, bar) => sum(counts.slice(bar * 4, bar * 4 + 4)));
  const total = Math.max(1, sum(bars));
  const highest = Math.max(...bars);
  const even = total / BARS;
  const scale = HEIGHT / Math.max(highest, 2 * even);
  const fullest = (100 * highest) / total;
  const words = `The fullest of ${BARS} bars holds ${fullest.toFixed(1)} % of the words`;
  const svg = make("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT + 12}`, role: "img", "aria-label": words });
  bars.forEach((count, bar) => {
    const height = count * scale;
    svg.append(make("rect", { x: bar * 4 + 0.5, y: HEIGHT - height, width: 3, height }));
  });
  const y = HEIGHT - even * scale;
  svg.append(make("line", { x1: 0, x2: WIDTH, y1: y, y2: y }));
  svg.append(label(0, "start", "00"), label(WIDTH / 2, "middle", "top byte"), label(WIDTH, "end", "ff"));
  const figure = document.createElement("figure");
  const caption = document.createElement("figcaption");
  caption.textContent = `${words} (even: ${(100 / BARS).toFixed(1)} %)`;
  figure.append(svg, caption);
  return figure;
}

function sum(numbers) {
  return numbers.reduce((one, other) => one + other, 0);
}

function label(x, anchor, text) {
  const made = make("text", { x, y: HEIGHT + 10, "text-anchor": anchor });
  made.textContent = text;
  return made;
}

function make(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}
