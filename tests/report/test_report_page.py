"""The report's page in a real browser: controls, charts and touch."""

import json
import shutil
import warnings

import pytest
from PIL import Image
from report_runs import line, write_run, write_samples

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
COLOURS = {2: "red", 4: "green", 6: "blue"}


@pytest.fixture(scope="module")
def browser():
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        reason = f"NO CHROMIUM (none of {', '.join(NAMES)}): the report's page is not tested; install one"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])  # root has no sandbox
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    import numpy as np

    from mf_dist.report.page import write_report

    run = write_run(tmp_path_factory.mktemp("page") / "run", [line(step) for step in (2, 4, 6)])
    (run / "samples").mkdir()
    for step, colour in COLOURS.items():
        Image.new("RGB", (300, 200), colour).save(run / f"samples/step{step:08d}.png")
    write_samples(run, 12, 32, np.random.default_rng(0))
    write_report([run], run / "report.html")
    return run / "report.html"


@pytest.fixture(params=[1280, 390])
def page(request, browser, report):
    """On a desktop and a phone: no error, no request, nothing wider than the window."""
    is_phone = request.param < 600
    context = browser.new_context(
        viewport={"width": request.param, "height": 900}, has_touch=is_phone, is_mobile=is_phone
    )
    context.set_default_timeout(120_000)  # for a busy machine
    tab, problems = context.new_page(), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.on("pageerror", lambda error: problems.append(str(error)))
    tab.on("request", lambda sent: problems.append(sent.url[:80]) if sent.url.startswith(("http", "ws")) else None)
    tab.goto(report.as_uri())
    tab.wait_for_selector(".plot .main-svg")
    yield tab
    assert problems == []
    assert tab.evaluate("document.documentElement.scrollWidth") == request.param
    context.close()


def colour_shown(page):
    """RGB of the middle of the picture in the samples' frame."""
    return page.evaluate("""async () => {
        const img = document.querySelector(".frames .pictures img"), canvas = document.createElement("canvas");
        await img.decode();
        canvas.width = canvas.height = 1;
        const pen = canvas.getContext("2d");
        pen.drawImage(img, 150, 100, 1, 1, 0, 0, 1, 1);
        return Array.from(pen.getImageData(0, 0, 1, 1).data).slice(0, 3);
    }""")


@pytest.mark.dist
def test_the_slider_and_the_browser_change_pictures(page):
    slider, output = page.locator(".frames input"), page.locator(".frames output")
    for step, key in ((6, None), (4, "ArrowLeft"), (2, "ArrowLeft"), (4, "ArrowRight")):
        if key:
            slider.press(key)
        red, green, blue = colour_shown(page)
        seen = "red" if red > 200 else "blue" if blue > 200 else "green" if green > 90 else "none"
        assert seen == COLOURS[step] and f"step {step}," in output.text_content()
    first = page.locator(".browser img").get_attribute("src")
    page.get_by_label("next class").click()
    assert page.locator(".browser select").input_value() == "1"
    assert page.locator(".browser img").get_attribute("src") != first
    page.locator(".browser img").click()
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


@pytest.mark.dist
def test_markup_in_names_is_shown_as_text(browser, tmp_path):
    from mf_dist.report.page import write_report

    names = ["<img src=x onerror=alert(1)>", "<a href='http:x'>b<"]
    runs = [write_run(tmp_path / name.replace("/", ""), classes=[name] * 3) for name in names]
    write_report(runs, tmp_path / "report.html")
    tab, problems = browser.new_page(), []
    tab.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto((tmp_path / "report.html").as_uri())
    tab.wait_for_selector(".plot .main-svg")
    legends = tab.locator(".plot").first.locator(".legendtext").all_text_contents()
    assert legends == [f"{run.name} · {part}" for run in runs for part in ("r = t", "r < t")]
    assert tab.locator(".plot a").count() == 0 and problems == []
    tab.close()


@pytest.mark.dist
@pytest.mark.parametrize("page", [390], indirect=True)
def test_touch_reads_values_and_pans_a_chart(page):
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").first.bounding_box()
    x, y = box["x"] + 0.5 * box["width"], box["y"] + 0.5 * box["height"]
    page.touchscreen.tap(x, y)
    plot.locator(".hoverlayer text").first.wait_for()
    assert "step 4" in plot.locator(".hoverlayer").text_content()
    buttons = plot.locator(".modebar-btn").all()
    assert min(min(button.bounding_box()[side] for side in ("width", "height")) for button in buttons) >= 38
    lowest = "p => p._fullLayout.xaxis.range[0]"
    touch = page.context.new_cdp_session(page)

    def drag():
        before = plot.evaluate(lowest)
        for kind, points in (("Start", [0]), ("Move", [-30]), ("Move", [-60]), ("End", [])):
            places = [{"x": x + moved, "y": y} for moved in points]
            touch.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": places})
        page.wait_for_timeout(300)
        return plot.evaluate(lowest) - before

    assert drag() == 0  # a finger scrolls the page
    move = plot.locator("[data-val=pan]")
    move.tap()
    assert drag() > 10
    move.tap()
    assert drag() == 0


@pytest.mark.dist
@pytest.mark.parametrize("page", [1280], indirect=True)
def test_no_log_scale_without_positive_values(page, report):
    plot = page.locator(".plot").nth(1)
    assert plot.evaluate("p => p._fullLayout.yaxis.type") == "log"
    page.evaluate("""() => {
        const chart = data.plots.curves[1];
        chart.traces.forEach((t) => t.y.fill(0));
        drawPlot(document.querySelectorAll(".plot")[1]);
    }""")
    assert plot.evaluate("p => p._fullLayout.yaxis.type") == "linear"
    assert page.get_by_label("switch the scale of v-loss").is_disabled()


@pytest.mark.dist
@pytest.mark.parametrize("page", [1280], indirect=True)
def test_hover_values_and_zoom(page):
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    box = plot.locator(".nsewdrag").first.bounding_box()

    def at(x, y):
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)

    at(0.5, 0.5)
    label = plot.locator(".hoverlayer")
    label.locator("text").first.wait_for()
    assert "step 4" in label.text_content() and "50" in label.text_content() and "75" in label.text_content()
    span = "p => { const [a, b] = p._fullLayout.xaxis.range; return b - a; }"
    before = plot.evaluate(span)
    at(0.3, 0.5)
    page.mouse.down()
    at(0.7, 0.5)
    page.mouse.up()
    page.wait_for_function(
        "([p, b]) => { const [x, y] = p._fullLayout.xaxis.range; return y - x < 0.6 * b; }",
        arg=[plot.element_handle(), before],
    )
    assert plot.evaluate(span) == pytest.approx(0.4 * before, rel=0.05)
    page.get_by_label("switch the scale of Raw loss").click()
    assert plot.evaluate("p => p._fullLayout.yaxis.type") == "linear"


@pytest.mark.dist
def test_a_sweep_is_drawn_against_guidance(browser, tmp_path):
    from mf_dist.report.page import write_report

    run = write_run(tmp_path / "run")
    (run / "eval").mkdir()
    point = {"metrics": {"fd_digits_20": 3.5}, "sweep": True, "nfe": 1, "step": 4, "interval": [0.4, 0.65]}
    (run / "eval/metrics.json").write_text(json.dumps([{**point, "guidance": scale} for scale in (2, 8, 4)]))
    write_report([run], run / "report.html")
    tab, problems = browser.new_page(), []
    tab.on("console", lambda message: problems.append(message.text))
    tab.goto((run / "report.html").as_uri())
    plot = tab.locator("#results .plot")
    plot.locator(".main-svg").first.wait_for()
    plot.scroll_into_view_if_needed()
    assert plot.locator(".legendtext").all_text_contents() == ["guidance in [0.4, 0.65], 1 step"]
    box = plot.locator(".nsewdrag").first.bounding_box()
    tab.mouse.move(box["x"] + 0.35 * box["width"], box["y"] + 0.5 * box["height"], steps=5)
    label = plot.locator(".hoverlayer")
    label.locator("text").first.wait_for()
    assert "guidance 4" in label.text_content() and "3.5, step 4" in label.text_content() and problems == []
    tab.close()
