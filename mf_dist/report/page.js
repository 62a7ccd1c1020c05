"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const compact = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });
const whole = new Intl.NumberFormat("en");
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const literal = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const isTouched = matchMedia("(pointer: coarse)").matches;

function tracesOf(chart) {
  const isOneRun = data.runs.length === 1;
  const curves = chart.traces.filter((t) => !t.points);
  const isSparse = Math.max(0, ...curves.map((t) => t.x.length)) < 30;
  return chart.traces.flatMap((t) => {
    const hue = colour(`--run${(isOneRun ? t.dash : t.run) % 6}`);
    const dash = isOneRun ? "solid" : ["solid", "dot", "dash", "dashdot"][t.dash % 4];
    const edge = { x: t.x, mode: "lines", line: { width: 0 }, hoverinfo: "skip", showlegend: false };
    const shade = t.low ? [{ ...edge, y: t.low }, { ...edge, y: t.high, fill: "tonexty", fillcolor: `${hue}38` }] : [];
    return [...shade, {
      x: t.x, y: t.y, name: literal(t.name), line: { color: hue, width: 1.8, dash },
      customdata: t.step.map((step, i) => (t.low ? [step, t.low[i], t.high[i]] : [step])),
      mode: t.points ? "markers" : isSparse ? "lines+markers" : "lines",
      marker: { size: t.points ? 9 : 6, symbol: t.points ? "diamond-open" : "circle", color: hue },
      hovertemplate: "%{y:.4~g}, step %{customdata[0]:,}" +
        (t.low ? `, ${t.is_band ? "95 % band" : "median of"} %{customdata[1]:.4~g} to %{customdata[2]:.4~g}` : ""),
    }];
  });
}

function layoutOf(chart, isLog) {
  const axis = { gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"), automargin: true };
  return {
    margin: { l: 50, r: 12, t: isTouched ? 48 : 32, b: 36 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: colour("--soft") },
    xaxis: chart.x
      ? { ...axis, unifiedhovertitle: { text: `${chart.x} %{x}` }, nticks: 12 }
      : { ...axis, tickformat: "~s", unifiedhovertitle: { text: "%{x:,} images" }, rangemode: "tozero", nticks: 7 },
    yaxis: {
      ...axis, rangemode: "tozero", type: isLog ? "log" : "linear", nticks: 6, exponentformat: "power",
      tickformat: isLog ? "~g" : "",
    },
    hovermode: "x unified", hoverdistance: -1,
    hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    showlegend: chart.traces.length > 1 || data.runs.length > 1 || "points" in chart.traces[0] || "x" in chart,
    legend: { orientation: "h", x: 0, xanchor: "left", yref: "container", y: 0, yanchor: "bottom", traceorder: "normal" },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--soft"), activecolor: colour("--accent") },
    dragmode: isTouched ? false : "zoom",
  };
}

// A finger scrolls the page unless one of these buttons is active: it then moves the chart or draws a box.
const touchButton = (name, title, icon) => ({
  name, title, icon, attr: "dragmode", val: name,
  click: (place) => Plotly.relayout(place, { dragmode: place._fullLayout.dragmode === name ? false : name }),
});

function buttons() {
  const touchModes = [["pan", "Move the chart", Plotly.Icons.pan], ["zoom", "Zoom to a box", Plotly.Icons.zoombox]];
  const dragging = isTouched ? touchModes.map((mode) => touchButton(...mode)) : ["zoom2d", "pan2d", "toImage"];
  return [["zoomIn2d", "zoomOut2d", "resetScale2d", ...dragging]];
}

function drawPlot(place) {
  const chart = data.plots[place.dataset.section][place.dataset.index];
  const canBeLog = chart.traces.some((t) => t.y.some((value) => value > 0));
  const isLog = canBeLog && (place.dataset.log ? place.dataset.log === "1" : chart.log);
  place.dataset.log = isLog ? "1" : "0";
  const scale = place.parentElement.querySelector(".scale");
  scale.textContent = isLog ? "log" : "linear";
  scale.disabled = !canBeLog;
  if (chart.traces.length > 3) place.style.height = `${250 + 19 * chart.traces.length}px`;  // room for the legend
  Plotly.react(place, tracesOf(chart), layoutOf(chart, isLog), {
    responsive: true, displaylogo: false, displayModeBar: isTouched ? true : "hover", modeBarButtons: buttons(),
  });
}

function drawPlots() {
  document.querySelectorAll(".plot").forEach(drawPlot);
}

function image(picture, alt, minimum) {
  const figure = document.createElement("figure");
  const img = document.createElement("img");
  Object.assign(img, { src: picture.src, alt, width: picture.w, height: picture.h });
  if (minimum && picture.w < minimum) {
    img.width = picture.w * Math.ceil(minimum / picture.w);
    img.height = picture.h * Math.ceil(minimum / picture.w);
  }
  const caption = document.createElement("figcaption");
  caption.textContent = picture.caption;
  figure.append(caption, img);
  return figure;
}

document.querySelectorAll(".frames").forEach((place) => {
  const frames = data.runs[place.dataset.run].frames;
  const slider = place.querySelector("input");
  const show = () => {
    const frame = frames[slider.value];
    const seen = frame.images === null ? "" : `, ${compact.format(frame.images)} images`;
    place.querySelector("output").textContent = `step ${whole.format(frame.step)}${seen}`;
    const figures = frame.pictures.map((picture) => image(picture, `samples at step ${frame.step}`, 0));
    place.querySelector(".pictures").replaceChildren(...figures);
  };
  slider.addEventListener("input", show);
  show();
});

document.querySelectorAll(".browser").forEach((place) => {
  const classes = data.runs[place.dataset.run].classes;
  const select = place.querySelector("select");
  const show = () => {
    const chosen = classes[select.value];
    const figures = chosen.pictures.map((picture) => image(picture, `samples of ${chosen.name}`, 500));
    place.querySelector(".pictures").replaceChildren(...figures);
  };
  const move = (by) => {
    select.value = (Number(select.value) + by + classes.length) % classes.length;
    show();
  };
  const [before, after] = place.querySelectorAll("button");
  before.addEventListener("click", () => move(-1));
  after.addEventListener("click", () => move(1));
  select.addEventListener("change", show);
  show();
});

const dialog = document.querySelector("dialog");
document.querySelector("main").addEventListener("click", (event) => {
  if (event.target.matches(".pictures img")) {
    dialog.querySelector("img").src = event.target.src;
    dialog.showModal();
  }
});
dialog.addEventListener("click", () => dialog.close());

document.querySelectorAll(".scale").forEach((button) =>
  button.addEventListener("click", () => {
    const place = button.closest("figure").querySelector(".plot");
    place.dataset.log = place.dataset.log === "1" ? "0" : "1";
    drawPlot(place);
  }),
);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawPlots);
drawPlots();
