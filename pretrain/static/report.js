// Values under the pointer, shown in the chart's legend.
for (const figure of document.querySelectorAll("figure")) {
  const svg = figure.querySelector("svg"), cursor = svg.querySelector(".cursor");
  const [high, left, right] = svg.dataset.x.split(" ").map(Number);
  const labels = [...figure.querySelectorAll("b")], last = labels.map((label) => label.textContent);
  const lines = [...svg.querySelectorAll(".line")].map((line) =>
    line.dataset.v.split(" ").map((pair) => pair.split(":").map(Number)));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const x = ((at - left) / (right - left)) * high;
    let shown = 0;
    lines.forEach((points, number) => {
      const nearest = points.reduce((best, point) => Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best);
      labels[number].textContent = +nearest[1].toPrecision(4);
      if (number === 0) shown = left + (right - left) * (high ? nearest[0] / high : 0.5);
    });
    cursor.setAttribute("transform", `translate(${shown} 0)`);
    cursor.style.opacity = 1;
  });
  svg.addEventListener("pointerleave", () => {
    labels.forEach((label, number) => { label.textContent = last[number]; });
    cursor.style.opacity = 0;
  });
}
