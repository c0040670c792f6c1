"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 50;
const get = id => document.getElementById(id);

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text; // never HTML: a model wrote it
  return element;
}

// ---- which questions are shown

let page = 0, chosen = 0, shown = [];
const greedy = (question, method) => question.answers[method]?.greedy;
const right = answer => answer !== undefined && data.verdicts[answer.verdict].startsWith("right");

function changed(question) {
  const before = right(greedy(question, "sft")), after = right(greedy(question, "sml"));
  return before === after ? "same" : after ? "gained" : "lost";
}

function matches(question) {
  const [task, method, verdict, change] = ["task", "method", "verdict", "change"].map(id => get(id).value);
  const words = get("words").value.toLowerCase();
  return (!task || question.task === task)
    && (!verdict || data.verdicts[greedy(question, method)?.verdict] === verdict)
    && (!change || changed(question) === change)
    && (!words || question.text.toLowerCase().includes(words));
}

function filter() {
  shown = data.questions.filter(matches);
  page = chosen = 0;
  list();
}

function list() {
  const pages = Math.max(1, Math.ceil(shown.length / PAGE)), items = get("items");
  get("count").textContent = `${shown.length.toLocaleString("en")} of ${data.questions.length.toLocaleString("en")} questions`;
  get("place").textContent = `page ${page + 1} of ${pages}`;
  get("back").disabled = page === 0;
  get("forth").disabled = page + 1 >= pages;
  items.replaceChildren(...shown.slice(page * PAGE, (page + 1) * PAGE).map((question, index) => {
    const row = make("button", "item");
    for (const method of data.methods) {
      const answer = greedy(question, method.name);
      row.append(make("span", answer ? `dot v${answer.verdict}` : "dot"));
    }
    row.append(make("span", "start", question.text));
    row.onclick = () => { chosen = page * PAGE + index; detail(); };
    return row;
  }));
  detail();
}

// ---- one question

function lines(answer) {
  const block = make("div", "lines");
  for (const [line, ok, reason] of answer.lines) {
    const row = make("div", ok === null ? "line" : ok ? "line right" : "line wrong", line || "(a step is missing)");
    if (reason) row.append(make("span", "reason", reason));
    block.append(row);
  }
  block.append(make("div", "line answer", answer.sentence || "(no answer sentence)"));
  return block;
}

function strip(tokens) {
  const block = make("div", "strip");
  const least = Math.min(...tokens.map(token => token[1]), -1);
  for (const [text, value] of tokens) {
    const token = make("span", "token", text.replaceAll("\n", "↵\n"));
    token.style.backgroundColor = `rgba(230, 120, 0, ${(0.85 * value / least).toFixed(3)})`;
    token.title = `${value.toFixed(2)} nats`;
    block.append(token);
  }
  return block;
}

function verdict(answer) {
  const text = answer.reason ? `${data.verdicts[answer.verdict]}: ${answer.reason}` : data.verdicts[answer.verdict];
  return make("p", `verdict v${answer.verdict}`, text);
}

function samples(answers) {
  const block = make("div", "samples"), text = make("div");
  for (const one of answers) {
    const label = one.score === null ? "·" : one.score.toFixed(1);
    const chip = make("button", `chip v${one.verdict}`, label);
    chip.title = data.verdicts[one.verdict];
    chip.onclick = () => text.replaceChildren(lines(one), verdict(one));
    block.append(chip);
  }
  block.append(text);
  return block;
}

function detail() {
  [...get("items").children].forEach((row, index) => row.classList.toggle("chosen", page * PAGE + index === chosen));
  const question = shown[chosen];
  if (!question) return get("detail").replaceChildren(make("p", "", "No question matches."));
  const columns = make("div", "columns");
  for (const method of data.methods) {
    const answer = question.answers[method.name];
    if (!answer) continue;
    const column = make("section", "column");
    column.append(make("h3", "", method.label), lines(answer.greedy), verdict(answer.greedy));
    if (answer.greedy.tokens) column.append(make("h4", "", "The reward model's score, token by token"), strip(answer.greedy.tokens));
    if (answer.samples.length) column.append(make("h4", "", `${answer.samples.length} samples, each with its score`), samples(answer.samples));
    columns.append(column);
  }
  get("detail").replaceChildren(make("h2", "", question.text), make("p", "faint", `${question.task} · ${question.id} · gold answer: ${question.gold}`), columns);
}

// ---- first pits

function pits() {
  const task = get("task").value;
  get("pits").replaceChildren(...data.pits.filter(pit => !task || pit.task === task).slice(0, 200).map(pit => {
    const block = make("section", "pit");
    block.append(make("p", "faint", `${pit.task} · first pit at step ${pit.step} of ${pit.steps}`), make("p", "", pit.text));
    block.append(make("pre", "", pit.prefix.trim()), make("pre", "wrong", pit.rejected.trim()), make("pre", "right", pit.chosen.trim()));
    return block;
  }));
}

// ---- controls

function options(id, names) {
  for (const name of names) {
    const option = make("option", "", name);
    option.value = name;
    get(id).append(option);
  }
}
options("task", data.tasks);
options("verdict", data.verdicts);
for (const method of data.methods) {
  const option = make("option", "", method.label);
  option.value = method.name;
  get("method").append(option);
}
get("method").value = data.methods.at(-1).name;
for (const id of ["task", "method", "verdict", "change"]) get(id).onchange = () => { filter(); pits(); };
get("words").oninput = filter;
get("back").onclick = () => { page -= 1; chosen = page * PAGE; list(); };
get("forth").onclick = () => { page += 1; chosen = page * PAGE; list(); };
document.onkeydown = event => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (!step || event.target.matches("input, select") || !shown[chosen + step]) return;
  event.preventDefault();
  chosen += step;
  if (Math.floor(chosen / PAGE) !== page) { page = Math.floor(chosen / PAGE); list(); } else detail();
  get("items").children[chosen % PAGE].scrollIntoView({ block: "nearest" });
};
get("pitted").hidden = !data.pits.length;
filter();
pits();
