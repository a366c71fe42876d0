// Draw the figures of a page as they come into view, and keep them, and framed explorers, in the colours that the reader chose.
const system = matchMedia('(prefers-color-scheme: dark)');
const shade = () => {
  const chosen = document.body.dataset.theme;
  return chosen === 'dark' || (chosen !== 'light' && system.matches) ? 'dark' : 'light';
};
const plots = [...document.querySelectorAll('.plot')], framed = [...document.querySelectorAll('.content iframe')];
const draw = div => {
  near.unobserve(div);
  const fig = JSON.parse(document.getElementById(`${div.id}-data`).textContent);
  fig.layout.template = themes[shade()];
  Plotly.newPlot(div, {...fig, config}).then(() => keys(div));
};
const near = new IntersectionObserver(seen => seen.filter(e => e.isIntersecting).forEach(e => draw(e.target)), {rootMargin: '300px'});
plots.forEach(div => near.observe(div));
addEventListener('beforeprint', () => plots.filter(div => !div.data).forEach(draw));
let shown = shade();
const recolour = () => {
  for (const frame of framed) frame.style.colorScheme = shade();
  if (shade() === shown) return;
  shown = shade();
  for (const div of plots) if (div.data) Plotly.relayout(div, {template: themes[shown]});
};
recolour();
system.addEventListener('change', recolour);
new MutationObserver(recolour).observe(document.body, {attributes: true, attributeFilter: ['data-theme']});
