// Draw the figures of a page and keep them, and framed explorers, in the colours that the reader chose.
const screen_ = matchMedia('(prefers-color-scheme: dark)');
const shade = () => {
  const chosen = document.body.dataset.theme;
  return chosen === 'dark' || (chosen !== 'light' && screen_.matches) ? 'dark' : 'light';
};
const plots = [...document.querySelectorAll('.plot')], frames_ = [...document.querySelectorAll('.content iframe')];
for (const div of plots) {
  const fig = JSON.parse(document.getElementById(`${div.id}-data`).textContent);
  fig.layout.template = themes[shade()];
  Plotly.newPlot(div, {...fig, config: {responsive: true, displaylogo: false}});
}
let shown = shade();
const recolour = () => {
  for (const f of frames_) f.style.colorScheme = shade();
  if (shade() === shown) return;
  shown = shade();
  for (const div of plots) Plotly.relayout(div, {template: themes[shown]});
};
recolour();
screen_.addEventListener('change', recolour);
new MutationObserver(recolour).observe(document.body, {attributes: true, attributeFilter: ['data-theme']});
