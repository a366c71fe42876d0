// Draws what `front.html` has a place for, from the data that `mebqat.explore.front_explorer` embeds.
// Uses `read`, `dark` and `theme` of the page's own script, and Plotly.
{
const data = read('front-data'), count = data.fitness.length, COSTS = ['bytes', 'bitops'];
const $ = id => document.getElementById(`front-${id}`);
const range = n => Array.from({length: n}, (_, i) => i);
const escape = s => s.replace(/[&<>"]/g, c => `&#${c.charCodeAt(0)};`);
const width = b => b === data.fp ? 'FP' : String(b);
const color = v => getComputedStyle(document.querySelector('.front')).getPropertyValue(v).trim();

const from = (steps, limit) => { const i = steps.findIndex(([, v]) => v === limit); return i < 0 ? steps.length - 1 : i; };
const state = {point: data.start.point, x: data.start.x};
COSTS.forEach((cost, k) => { state[cost] = from(data.limits[cost], data.start.limits[k]); });

// Budget and front, as `best_point` and `undominated` define them.
const limit = cost => data.limits[cost][state[cost]][1] ?? Infinity;
const limited = () => COSTS.some(cost => limit(cost) < Infinity);
const fits = i => COSTS.every(cost => data[cost][i] <= limit(cost));
const before = (...keys) => (i, j) => { for (const key of keys) if (key(i) !== key(j)) return key(i) - key(j); return i - j; };
const best = () => range(count).filter(fits).sort(before(i => -data.fitness[i], i => data.bitops[i], i => data.bytes[i]))[0];
function stairs(some) {
  let top = -Infinity;
  return [...some].sort(before(i => data[state.x][i], i => -data.fitness[i])).filter(i => data.fitness[i] > top && (top = data.fitness[i], true));
}
function walk() {
  const all = range(count), some = all.filter(fits);
  return stairs(some.length ? some : all);
}

const place = some => ({x: some.map(i => data[state.x][i]), y: some.map(i => data.fitness[i])});
const mark = (i, name, marker) => ({type: 'scatter', mode: 'markers', name, hoverinfo: 'skip', showlegend: i !== undefined, ...place(i === undefined ? [] : [i]), marker});
function layers(method, k) {
  const own = range(count).filter(i => data.method[i] === k), line = stairs(own.filter(fits)), rest = own.filter(i => !line.includes(i));
  const dots = (some, more) => ({type: 'scatter', ...place(some), customdata: some, hovertext: some.map(i => escape(data.short[i])), hoverinfo: 'text', name: escape(method.name), legendgroup: k, ...more});
  return [dots(rest, {mode: 'markers', showlegend: false, marker: {size: 8, color: rest.map(i => fits(i) ? method.color : '#8c8c8c'), opacity: rest.map(i => fits(i) ? 0.35 : 0.6),
                      symbol: rest.map(i => fits(i) ? method.symbol : `${method.symbol}-open`)}}),
          dots(line, {mode: 'lines+markers', showlegend: true, line: {shape: 'hv', color: method.color, width: 2}, marker: {size: 9, color: method.color, symbol: method.symbol}})];
}

let drawn = '';
const ring = () => mark(state.point, 'chosen', {symbol: 'circle-open', size: 18, color: color('--mark'), line: {width: 3}});
function drawPicture() {
  const {point, ...rest} = state, drawing = JSON.stringify([rest, dark.matches]);
  if (drawing === drawn) { const {x, y} = ring(); return Plotly.restyle('front-picture', {x: [x], y: [y]}, [2*data.methods.length + 1]); }
  $('legend').innerHTML = `Each point is a policy; the staircase of a method joins those that nothing cheaper matches, pale points are off it. Click one to see its bits.${limited() ? ' Grey hollow points are over the budget.' : ''}`;
  const star = mark(limited() ? best() : undefined, 'best allowed', {symbol: 'star', size: 17, color: '#e69f00', line: {width: 1.5, color: '#111'}});
  const x0 = limit(state.x), shapes = x0 < Infinity ? [{type: 'line', yref: 'paper', y0: 0, y1: 1, x0, x1: x0, line: {width: 2, dash: 'dash', color: color('--soft')}}] : [];
  const axis = a => ({...a, title: {text: a.title}, fixedrange: true, zeroline: false, automargin: true});
  Plotly.react('front-picture', [...data.methods.flatMap(layers), star, ring()], {shapes, xaxis: axis(data.axes[state.x]), yaxis: axis(data.accuracy), template: theme(), hovermode: 'closest',
    dragmode: false, margin: {l: 62, r: 10, t: 60, b: 48}, legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom', itemclick: false, itemdoubleclick: false}}, {responsive: true, displayModeBar: false});
  drawn = drawing;
}

function drawReadout() {
  const steps = walk(), on = steps.indexOf(state.point), cheaper = steps.filter(i => data[state.x][i] <= data[state.x][state.point]).length;
  const said = `${on < 0 ? 'off the front' : `${on + 1} of ${steps.length}`}`;
  $('step').max = steps.length - 1; $('step').value = on < 0 ? Math.max(0, cheaper - 1) : on; $('step').disabled = steps.length < 2 && on === 0;
  $('step-said').textContent = said; $('step').setAttribute('aria-valuetext', `${said}: ${data.short[state.point]}`);
  const [head, ...more] = data.story[state.x][state.point].split('<br>');
  const big = head.match(/^<b>(.*?)<\/b> with (.*)$/);
  $('readout').innerHTML = `<p class="big">${big[1]}</p><p>${big[2]}</p>${more.map(t => `<p>${t}</p>`).join('')}${fits(state.point) ? '' : '<p class="over">Over the budget.</p>'}`;
}

function drawBudget() {
  const star = best();
  for (const cost of COSTS) {
    const said = data.limits[cost][state[cost]][0];
    $(cost).value = state[cost]; $(`${cost}-said`).textContent = said; $(cost).setAttribute('aria-valuetext', said);
  }
  $('best').innerHTML = star === undefined ? 'No policy here costs as little.' : `Best ${limited() ? 'allowed' : 'of all'}: <b>${escape(data.short[star])}</b>`;
  $('go').disabled = star === undefined || star === state.point;
}

const BITS = [['weight bits', '#0072b2'], ['activation bits', '#e69f00']];
function drawBars() {
  const bits = data.policy[state.point].map(k => data.pairs[k]), bytes = data.weights && bits.map(([w], l) => data.weights[l]*w/8), deep = Boolean(bytes);
  const bars = (y, name, colour, more) => ({type: 'bar', x: data.names, y, name, marker: {color: colour}, ...more}), top = Math.max(...data.pairs.flat());
  const traces = BITS.map(([name, colour], k) => bars(bits.map(b => b[k]), name, colour, {hovertext: bits.map((b, l) => `${escape(data.names[l])}: ${width(b[k])} ${name}`), hoverinfo: 'text'}));
  if (deep) traces.push(bars(bytes, 'bytes', '#009e73', {yaxis: 'y2', xaxis: 'x2', showlegend: false}));
  const category = more => ({type: 'category', tickangle: -40, automargin: true, fixedrange: true, ...more});
  const value = (title, more) => ({title: {text: title}, fixedrange: true, rangemode: 'tozero', ...more});
  const layout = {template: theme(), height: deep ? 400 : 280, bargap: 0.25, margin: {l: 60, r: 10, t: 36, b: 30}, legend: {orientation: 'h', x: 0, y: 1.02, yanchor: 'bottom'},
    yaxis: value('bits', {domain: deep ? [0.52, 1] : [0, 1], range: [0, 1.05*top]}), xaxis: category(deep ? {showticklabels: false, anchor: 'y'} : {})};
  if (deep) Object.assign(layout, {yaxis2: value('bytes', {domain: [0, 0.44], range: [0, 1.05*Math.max(...data.weights.map(n => n*Math.max(...data.pairs.map(p => p[0]))/8))], tickformat: '~s'}),
                                   xaxis2: category({anchor: 'y2', matches: 'x'})});
  Plotly.react('front-bars', traces, layout, {responsive: true, displayModeBar: false});
  const row = (name, l) => `<tr><th scope="row">${escape(name)}</th><td>${width(bits[l][0])}</td><td>${width(bits[l][1])}</td>${deep ? `<td>${data.weights[l].toLocaleString('en')}</td><td>${bytes[l].toLocaleString('en')}</td>` : ''}</tr>`;
  $('table').innerHTML = `<table><thead><tr><th scope="col">layer</th><th scope="col">weight bits</th><th scope="col">activation bits</th>${deep ? '<th scope="col">weights</th><th scope="col">bytes</th>' : ''}</tr></thead>` +
    `<tbody>${data.names.map(row).join('')}</tbody></table>`;
}

function draw() { drawReadout(); drawBudget(); drawPicture(); drawBars(); }

for (const cost of COSTS) $(cost).max = data.limits[cost].length - 1;
const on = (element, event, f) => element.addEventListener(event, () => { f(element); draw(); });
for (const cost of COSTS) on($(cost), 'input', t => { state[cost] = +t.value; });
on($('step'), 'input', t => { state.point = walk()[t.value]; });
on($('go'), 'click', () => { state.point = best(); });
for (const radio of document.querySelectorAll('input[name="front-x"]')) { radio.checked = radio.value === state.x; on(radio, 'change', t => { state.x = t.value; }); }
dark.addEventListener('change', draw);
draw();
$('picture').on('plotly_click', e => { state.point = e.points[0].customdata; draw(); });
}
