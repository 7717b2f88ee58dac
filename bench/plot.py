"""The plot of the measurements, as SVG."""

COLOURS = {"original 1.10": "#b8b0a4", "clamsmtpd": "#1f6fb2", "TCP proxy": "#7ea172"}
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

    def svg(self, width, height):
        return ('<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" '
                'viewBox="0 0 %d %d" font-family="sans-serif" fill="#222">\n'
                '<rect width="100%%" height="100%%" fill="#fff"/>\n%s\n</svg>\n'
                % (width, height, width, height, "\n".join(self.parts)))


def bars(drawing, x, y, title, groups):
    """Draw groups of bars, each with its own scale.  Returns the lower end."""
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


def svg(cpu, latency):
    drawing = Drawing()
    lower = max(
        bars(drawing, 20, 30, "CPU per message: less is better", cpu),
        bars(drawing, 20 + WIDTH / 2, 30,
             "median time from the final dot to the answer", latency))
    return drawing.svg(WIDTH, lower + 20)
