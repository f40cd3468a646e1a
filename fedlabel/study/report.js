/* Draws the charts of a report from the JSON in the page. Texts reach the page through echarts' own escaping, or `escaped`. */
"use strict";
{
  const data = JSON.parse(document.getElementById("data").textContent);
  const RUNS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#777777"];
  const DASHES = ["solid", "dashed", "dotted", [8, 3, 2, 3], [12, 4], [2, 6]];
  const BARS = { local: "#0072b2", "local-wrong": "#9dc8e4", global: "#e69f00", "global-wrong": "#f5d899", none: "#8a8a8a55" };

  const escaped = (text) => String(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const shown = (value, unit) =>
    value === null || value === undefined || Number.isNaN(value) ? "–" : `${Number(value.toPrecision(4))}${unit ? " " + unit : ""}`;

  /* Lines of a chart's legend at this width; it stands below the chart, which it makes higher. */
  function legendLines(chart, width) {
    const names = named(chart);
    if (names.length < (chart.kind === "curves" && data.runs.length > 1 ? 1 : 2)) return 0;
    let lines = 1, used = 0;
    for (const name of names) {
      const wide = 44 + measure(name);
      if (used > 0 && used + wide > width - 10) { lines += 1; used = 0; }
      used += wide;
    }
    return lines;
  }
  /* The title says what the edges of a band are. */
  const named = (chart) => (chart.series || []).filter((each) => !each.edge).map((each) => each.name);
  const font = getComputedStyle(document.body).fontFamily;
  const pen = document.createElement("canvas").getContext("2d");
  const measure = (text) => { pen.font = `12px ${font}`; return pen.measureText(text).width; };

  function base(lines = 0) {
    const ink = css("--ink"), soft = css("--soft"), line = css("--line"), paper = css("--paper");
    const axis = {
      axisLine: { lineStyle: { color: soft } }, axisTick: { show: false }, axisLabel: { color: soft },
      splitLine: { lineStyle: { color: line } }, nameTextStyle: { color: soft },
    };
    return {
      axis,
      option: {
        animation: false, textStyle: { color: ink, fontFamily: font }, color: RUNS,
        tooltip: { backgroundColor: paper, borderColor: line, textStyle: { color: ink }, confine: true },
        legend: { show: lines > 0, bottom: 0, left: 0, itemGap: 12, itemWidth: 24, itemHeight: 10, textStyle: { color: ink },
                  inactiveColor: soft },
        grid: { left: 8, right: 22, top: 20, bottom: 32 + 24 * lines, containLabel: true },
      },
    };
  }

  /* Ends of an axis of shares: round ones, never beyond 0 and 100 %. */
  const PERCENT = {
    min: (found) => (found.min < 25 || found.min === found.max ? 0 : 10 * Math.floor(found.min / 10)),
    max: (found) => {
      const step = found.max > 20 ? 10 : found.max > 5 ? 5 : 1;
      return Math.min(100, step * Math.max(1, Math.ceil(found.max / step)));
    },
  };

  function curves(chart, lines) {
    const { axis, option } = base(lines);
    const several = data.runs.length > 1;
    return {
      ...option,
      legend: { ...option.legend, data: named(chart) },
      tooltip: { ...option.tooltip, trigger: "axis", valueFormatter: (value) => shown(value, chart.unit) },
      xAxis: { ...axis, type: "value", name: "round", nameLocation: "middle", nameGap: 24, minInterval: 1, min: "dataMin", max: "dataMax",
               splitLine: { show: false }, axisPointer: { label: { formatter: (point) => `round ${Math.round(point.value)}` } } },
      yAxis: { ...axis, type: "value", scale: true, ...(chart.unit === "%" ? PERCENT : {}) },
      series: chart.series.map((each, place) => ({
        type: "line", name: each.name, data: each.points, symbol: "circle", showSymbol: each.points.length < 25 && !each.edge, symbolSize: 4,
        color: RUNS[(several || each.edge ? each.run : each.curve) % RUNS.length],
        lineStyle: { width: each.edge ? 1 : 2, type: each.edge ? "dashed" : DASHES[(several ? each.curve : 0) % DASHES.length] },
        markLine: place > 0 || several ? undefined : {
          silent: true, symbol: "none", lineStyle: { color: css("--soft"), type: "dotted" },
          label: { color: css("--soft"), formatter: (mark) => mark.name, position: "insideEndBottom", fontSize: 11 },
          data: data.stages.slice(1).map(([name, first]) => ({ name, xAxis: first })),
        },
      })),
    };
  }

  function bars(chart, lines) {
    const { axis, option } = base(lines);
    return {
      ...option,
      grid: { ...option.grid, top: 6, bottom: 8 + 24 * lines },
      tooltip: { ...option.tooltip, trigger: "axis", axisPointer: { type: "shadow" }, valueFormatter: (value) => shown(value, "%") },
      xAxis: { ...axis, type: "value", min: 0, max: 100, axisLabel: { ...axis.axisLabel, formatter: "{value} %" } },
      yAxis: { ...axis, type: "category", inverse: true, data: chart.names,
               axisLabel: { ...axis.axisLabel, width: 110, overflow: "truncate" } },
      series: chart.series.map((each) => ({
        type: "bar", name: each.name, data: each.values, stack: chart.stacked ? "all" : undefined, color: BARS[each.color], barCategoryGap: "25%",
      })),
    };
  }

  function clients(chart) {
    const { axis, option } = base();
    const named = chart.names.some((name) => name.includes(":"));
    return {
      ...option,
      tooltip: { ...option.tooltip, trigger: "axis", axisPointer: { type: "shadow" }, formatter: ([point]) =>
        [`<b>client ${escaped(chart.names[point.dataIndex])}</b>`, ...chart.columns.map((column, place) =>
          `${escaped(column)}: ${shown(chart.values[point.dataIndex][place], column === "training loss" ? "nats" : "%")}`)].join("<br>") },
      xAxis: { ...axis, type: "category", name: named ? "" : "client", nameLocation: "middle", nameGap: 26, data: chart.names,
               axisLabel: { ...axis.axisLabel, ...(named ? { rotate: 40, width: 90, overflow: "truncate" } : {}) } },
      yAxis: { ...axis, type: "value", min: 0, max: 100 },
      series: [{
        type: "bar", data: chart.values.map((row) => row[0]), color: BARS.local, barMaxWidth: 40,
        markLine: { silent: true, symbol: "none", lineStyle: { color: css("--ink"), type: "dashed" },
                    label: { color: css("--ink"), formatter: "mean", position: "insideEndTop" }, data: [{ yAxis: chart.mean }] },
      }],
    };
  }

  function bubbles(chart, lines) {
    const { axis, option } = base(lines);
    const cells = chart.clients.flatMap((_, client) => chart.classes.map((_, label) =>
      [label, client, chart.with_supervision[client][label], chart.without[client][label]]));
    const largest = Math.max(1, ...cells.map(([, , labelled, rest]) => labelled + rest));
    const size = (samples) => (samples ? Math.max(3, 20 * Math.sqrt(samples / largest)) : 0);
    const series = (name, color, count) => ({
      type: "scatter", name, color, data: cells.filter((cell) => count(cell) > 0), symbolSize: (cell) => size(count(cell)),
    });
    return {
      ...option,
      tooltip: { ...option.tooltip, trigger: "item", formatter: ({ value: [label, client, labelled, rest] }) =>
        `client ${escaped(chart.clients[client])}, class ${escaped(chart.classes[label])}<br>${labelled + rest} samples, ${labelled} with supervision` },
      grid: { ...option.grid, top: 8 },
      xAxis: { ...axis, type: "category", name: "true class", nameLocation: "middle", nameGap: 26, data: chart.classes,
               axisLabel: { ...axis.axisLabel, width: 80, overflow: "truncate" }, splitLine: { ...axis.splitLine, show: true } },
      yAxis: { ...axis, type: "category", inverse: true, data: chart.clients.map((client) => `client ${client}`),
               axisLabel: { ...axis.axisLabel, width: 150, overflow: "truncate" }, splitLine: { ...axis.splitLine, show: true } },
      series: [
        series(chart.series[0].name, isDark() ? "#6b8fa8" : "#b5d3e6", (cell) => cell[2] + cell[3]),
        series(chart.series[1].name, "#d55e00", (cell) => cell[2]),
      ],
    };
  }

  const KINDS = { curves, bars, clients, bubbles };
  const drawn = data.charts.map((chart) => {
    const place = document.getElementById(chart.id);
    const plot = echarts.init(place, null, { renderer: "svg" });
    function draw() {
      const lines = legendLines(chart, place.clientWidth);
      place.style.height = `${chart.height + 24 * lines}px`;
      plot.resize();
      plot.setOption(KINDS[chart.kind](chart, lines), true);
    }
    draw();
    return draw;
  });
  const again = () => drawn.forEach((draw) => draw());
  document.addEventListener("theme", again);
  addEventListener("resize", again);

  /* Paper is light, and about 700 pixels wide; charts are drawn before the page is laid out for it. */
  const root = document.documentElement;
  let chosen;
  addEventListener("beforeprint", () => { chosen = root.dataset.theme; root.dataset.theme = "light"; document.body.style.width = "700px"; again(); });
  addEventListener("afterprint", () => {
    if (chosen === undefined) delete root.dataset.theme; else root.dataset.theme = chosen;
    document.body.style.width = "";
    again();
  });
}
