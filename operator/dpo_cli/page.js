"use strict";
// Reads each chart's data-hover and shows the values under the pointer in its legend. Without it the page lacks nothing else.
for (const svg of document.querySelectorAll("svg[data-hover]")) {
  const data = JSON.parse(svg.dataset.hover), figure = svg.closest("figure"), cursor = svg.querySelector(".cursor");
  const left = LEFT_EDGE, right = RIGHT_EDGE, width = svg.viewBox.baseVal.width;
  const nearest = (points, step) => {
    let low = 0, high = points.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (points[middle][0] < step) low = middle + 1; else high = middle; }
    return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
  };
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * width;
    const share = Math.min(1, Math.max(0, (at - left) / (right - left))), step = share * data.last;
    let shown = null;
    for (const label of figure.querySelectorAll("[data-line]")) {
      const point = nearest(data.lines[label.dataset.line], step);
      if (shown === null || Math.abs(point[0] - step) < Math.abs(shown - step)) shown = point[0];
      label.textContent = point[1];
    }
    const x = left + shown / data.last * (right - left);
    cursor.setAttribute("x1", x); cursor.setAttribute("x2", x);
    figure.querySelector(".at").textContent = "step " + shown.toLocaleString("en");
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("x1", -9); cursor.setAttribute("x2", -9);
    for (const label of figure.querySelectorAll("[data-line]")) label.textContent = label.dataset.last;
    figure.querySelector(".at").textContent = "";
  });
}
