// Use the page as a person does, in headless Chromium; print what was seen as JSON.
const { readFileSync } = require("fs");
const { chromium } = require("playwright-core");

(async () => {
  const [url, executablePath] = process.argv.slice(2);
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
  const seen = { requests: [], errors: [], violations: [] };
  const context = await browser.newContext({ viewport: { width: 1300, height: 850 } });
  const page = await context.newPage();
  page.on("request", (request) => seen.requests.push(request.url()));
  page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");
  const check = async () => {
    await page.evaluate(axe);
    const { violations } = await page.evaluate(() => axe.run());
    seen.violations.push(...violations.map((each) => `${each.id}: ${each.nodes[0].html}`));
  };
  const run = async (act) => {
    await page.evaluate(() => { document.getElementById("status").textContent = ""; });
    await act();
    await page.waitForFunction(() => document.getElementById("status").textContent.startsWith("Done") || !document.getElementById("error").hidden);
  };
  const texts = (selector) => page.locator(selector).evaluateAll((all) => all.map((each) => each.textContent));
  const metric = (words) => page.locator("#metrics li", { hasText: words }).locator("strong").textContent().then(Number);
  // Animations would be measured by axe half-way.
  await page.emulateMedia({ reducedMotion: "reduce" });

  await page.goto(url);
  await check();

  // A prompt is answered; its tokens are told apart by more than colour.
  await page.fill("#prompt", "What is the capital of France?");
  await page.fill("#max_tokens", "5");
  await run(() => page.keyboard.press("Control+Enter"));
  seen.answer = await texts("#answer-tokens .token");
  seen.prompt = await texts("#prompt-tokens .token");
  seen.label = await page.locator("#answer-tokens .token").first().getAttribute("aria-label");
  seen.shades = await page.locator("#answer-tokens .token").evaluateAll((all) => new Set(all.map((each) => getComputedStyle(each).backgroundColor)).size);

  // The keyboard alone: to the tokens, along them, and to an alternative.
  await page.locator("#answer-tokens .token").first().focus();
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("ArrowRight");
  await page.keyboard.press("Enter");
  seen.focused = await page.evaluate(() => document.activeElement.textContent);
  seen.spelt = await page.locator("#spelt").textContent();
  seen.bars = await texts("#alternatives .percent");
  await check();
  await page.locator("#alternatives button").first().focus();
  seen.alternative = await page.evaluate(() => document.activeElement.querySelector("code").textContent);
  await run(() => page.keyboard.press("Enter"));
  seen.branch = await texts("#answer-tokens .token");
  seen.reused = await metric("reused");
  seen.input = await metric("prompt tokens");
  await page.click("#back");
  seen.back = await texts("#answer-tokens .token");

  // Choices are compared; a constraint that is none is an error in words.
  await page.getByText("Choices", { exact: true }).first().click();
  await page.fill("#constraint-text", "Rome\nParis");
  await run(() => page.click("#run"));
  seen.choices = await texts("#distribution-bars code");
  seen.chosen = await texts("#answer-tokens .token");
  await check();
  await page.getByText("Regex", { exact: true }).click();
  await page.fill("#constraint-text", "[A-Z][a-z]+ [a-z]+");
  await run(() => page.click("#run"));
  seen.constrained = await page.locator("#freed").isVisible();
  await page.locator("#answer-tokens .token").nth(1).click();
  await run(() => page.locator("#alternatives button").first().click());
  seen.freed = await page.locator("#freed").isVisible();
  await check();
  await page.fill("#constraint-text", "(a");
  await run(() => page.click("#run"));
  seen.error = await page.locator("#error").textContent();

  // A phone in the dark.
  await page.setViewportSize({ width: 360, height: 740 });
  await page.emulateMedia({ colorScheme: "dark", reducedMotion: "reduce" });
  await page.getByText("None", { exact: true }).click();
  await run(() => page.click("#run"));
  await page.locator("#answer-tokens .token").nth(1).click();
  seen.sheet = await page.locator("#details").evaluate((each) => getComputedStyle(each).position);
  seen.overflow = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  await check();

  // A model that is busy when the page is opened, and then is not.
  const opened = await (await browser.newContext()).newPage();
  const refuse = (status, body) => opened.route("**/inspect", (route) => route.fulfill({ status, body }));
  const failed = () => opened.waitForFunction(() => !document.getElementById("error").hidden);
  await refuse(503, JSON.stringify({ error: { message: "The target is busy; ask again later." } }));
  await opened.goto(url);
  await failed();
  seen.busy = await opened.locator("#error").textContent();
  await opened.unroute("**/inspect");
  await refuse(502, "<html>Bad gateway</html>");
  await opened.click("#run");
  await opened.waitForFunction(() => document.getElementById("error").textContent.includes("502"));
  seen.down = await opened.locator("#error").textContent();
  await opened.unroute("**/inspect");
  await opened.fill("#max_tokens", "2");
  await opened.click("#run");
  await opened.waitForFunction(() => document.getElementById("status").textContent.startsWith("Done"));
  seen.up = [await opened.locator("#error").isVisible(), await opened.locator("#model").textContent()];

  console.log(JSON.stringify(seen));
  await browser.close();
})();
