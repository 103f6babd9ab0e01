// Draws the live view on canvases, in the colours of the legend beside them: the style sheet alone knows the palette.

const BAR_GAP = 1;

/** A canvas's context, its bitmap as sharp as the screen, its size in CSS pixels. */
function prepare(canvas, height = canvas.clientHeight) {
  const ratio = window.devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const [pixelsWide, pixelsHigh] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== pixelsWide || canvas.height !== pixelsHigh) {
    canvas.width = pixelsWide;
    canvas.height = pixelsHigh;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

export function colourOf(selector) {
  return getComputedStyle(document.querySelector(selector)).backgroundColor;
}

function textColour(canvas) {
  return getComputedStyle(canvas.closest("figure").querySelector(".key")).color;
}

function lineColour() {
  return getComputedStyle(document.querySelector("#panel-engine")).borderTopColor;
}

/** The frame of a chart: a floor, a line at the top, and what the top stands for. */
function frame(canvas, { context, width, height }, top) {
  context.strokeStyle = lineColour();
  context.lineWidth = 1;
  context.beginPath();
  for (const y of [0.5, Math.round(height / 2) + 0.5, height - 0.5]) {
    context.moveTo(0, y);
    context.lineTo(width, y);
  }
  context.stroke();
  context.fillStyle = textColour(canvas);
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "top";
  context.fillText(top.toLocaleString("en"), 2, 4);
}

/** Stacked bars: each of `parts` is {values, colour}; a value is null where nothing is known. */
export function drawBars(canvas, parts, top) {
  const surface = prepare(canvas);
  const { context, width, height } = surface;
  frame(canvas, surface, top);
  const count = parts[0].values.length;
  const step = width / count;
  for (let i = 0; i < count; i++) {
    let y = height - 1;
    for (const { values, colour } of parts) {
      const value = values[i];
      if (!value) continue;
      const tall = Math.max(1, (value / top) * (height - 2));
      context.fillStyle = colour;
      context.fillRect(i * step, y - tall, Math.max(1, step - BAR_GAP), tall);
      y -= tall;
    }
  }
}

/** Lines over a faint area, one for each of `parts`; a gap where nothing is known. */
export function drawLines(canvas, parts, top) {
  const surface = prepare(canvas);
  const { context, width, height } = surface;
  frame(canvas, surface, top);
  for (const { values, colour } of parts) {
    const step = width / Math.max(1, values.length - 1);
    const y = (value) => height - 1.5 - (value / top) * (height - 4);
    let start = null;
    values.forEach((value, i) => {
      if (value !== null && start === null) start = i;
      if (start !== null && (value === null || i === values.length - 1)) {
        const end = value === null ? i - 1 : i;
        line(context, values.slice(start, end + 1).map((v, j) => [(start + j) * step, y(v)]), colour, height);
        start = null;
      }
    });
  }
}

function line(context, points, colour, floor) {
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.strokeStyle = colour;
  context.lineWidth = 1.6;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(points.at(-1)[0], floor - 1);
  context.lineTo(points[0][0], floor - 1);
  context.globalAlpha = 0.14;
  context.fillStyle = colour;
  context.fill();
  context.globalAlpha = 1;
}

/** The squares of a map, in rows; `colours` has one for each state. */
export function drawMap(canvas, { squares, size, columns, rows }, colours) {
  canvas.style.height = `${rows * size}px`;
  const { context } = prepare(canvas, rows * size);
  const side = size - (size > 10 ? 2 : 1.5);
  // State by state: a canvas is slow at changing colours, not at filling squares.
  colours.forEach((colour, state) => {
    context.fillStyle = colour;
    context.beginPath();
    for (let i = squares.indexOf(state); i >= 0; i = squares.indexOf(state, i + 1)) {
      context.roundRect((i % columns) * size, Math.floor(i / columns) * size, side, side, Math.min(2.5, side / 4));
    }
    context.fill();
  });
}
