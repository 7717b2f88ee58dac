"""The plot of the measurements, as SVG."""

COLOURS = {"original 1.10": "#b8b0a4", "clamsmtpd": "#1f6fb2", "TCP proxy": "#7ea172",
           "no filter": "#d8b25c"}
WIDTH, BAR, PANEL = 920, 15, 420


class Drawing:
    def __init__(self):
        self.parts = []

    def text(self, x, y, text, size=12, anchor="start", weight="normal"):
        self.parts.append(
            '<text x="%.1f" y="%.1f" font-size="%d" text-anchor="%s" font-weight="%s">%s'
            '</text>' % (x, y, size, anchor, weight, text))

    def box(self, x, y, width, height, colour):
        self.parts.append('<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>'
                          % (x, y, max(width, 1), height, colour))

    def line(self, points, colour, width=1):
        self.parts.append(
            '<polyline points="%s" fill="none" stroke="%s" stroke-width="%g"/>'
            % (" ".join("%.1f,%.1f" % point for point in points), colour, width))

    def svg(self, width, height):
        return ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
                'viewBox="0 0 %d %d" font-family="sans-serif" fill="#222">\n'
                '<rect width="100%%" height="100%%" fill="#fff"/>\n%s\n</svg>\n'
                % (width, height, width, height, "\n".join(self.parts)))


def bars(drawing, x, y, title, groups):
    """Groups of bars, each group with a scale of its own; returns the lower end."""
    drawing.text(x, y, title, 14, weight="bold")
    y += 12
    for name, values in groups:
        y += 20
        drawing.text(x, y, name)
        y += 6
        most = max((value for _, value, _ in values), default=1)
        for label, value, shown in values:
            length = value / most * (PANEL - 190)
            drawing.box(x, y, length, BAR - 2, COLOURS[label])
            drawing.text(x + length + 6, y + BAR - 4, "%s  %s" % (shown, label), 11)
            y += BAR
    return y


def ceiling(value):
    """The next number that is good for an axis."""
    step = 10 ** (len(str(int(value))) - 1)
    return next(top for top in (step, 2 * step, 5 * step, 10 * step) if top >= value)


def curve(drawing, x, y, width, height, title, lines, stops):
    drawing.text(x, y, title, 14, weight="bold")
    y += 24
    at = x
    for name, _ in lines:
        label = name + (": fails at {:,}".format(stops[name]) if stops[name] else "")
        drawing.box(at, y - 9, 10, 10, COLOURS[name])
        drawing.text(at + 16, y, label)
        at += 40 + 7 * len(label)
    y += 18
    points = [point for _, values in lines for point in values]
    right = max((at for at, _ in points), default=0) or 1
    top = ceiling(max((value for _, value in points), default=1))

    def place(at, value):
        return x + 45 + at / right * (width - 90), y + height - value / top * height

    for part in range(5):
        value = top * part / 4
        drawing.line([place(0, value), place(right, value)], "#ddd")
        drawing.text(x + 38, place(0, value)[1] + 4, "{:,g}".format(value), 11, "end")
    for at in range(0, right + 1, 1000):
        drawing.text(place(at, 0)[0], y + height + 16, "{:,}".format(at), 11, "middle")
    drawing.text(place(right / 2, 0)[0], y + height + 34, "idle sessions", 11, "middle")
    for name, values in lines:
        drawing.line([place(*point) for point in values], COLOURS[name], 2.5)
        for point in values:
            px, py = place(*point)
            drawing.box(px - 3, py - 3, 6, 6, COLOURS[name])
    return y + height + 44


def svg(cpu, rate, lines, stops):
    drawing = Drawing()
    lower = max(
        bars(drawing, 20, 30, "CPU a message: less is better", cpu),
        bars(drawing, 20 + WIDTH / 2, 30, "messages a second, 10 at once: more is better",
             rate))
    lower = curve(drawing, 20, lower + 44, WIDTH - 40, 170,
                  "CPU a message of 2 KB in microseconds, 10 active sessions beside idle ones",
                  lines, stops)
    return drawing.svg(WIDTH, lower)
