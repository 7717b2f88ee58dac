/*
 * The reference for message bodies: what a strict server would store after the
 * normalisation that the manual page describes under TRANSPARENCY.  It applies
 * one rule after the other, slowly.
 */

/* Find the end of data in the n bytes of DATA at p.  Returns 1 with the size of
 * the body (the CRLF before the dot included) and the number of bytes taken, or
 * 0 when there is no end yet. */
static __attribute__((unused)) int
ref_end(const char *p, size_t n, size_t *body, size_t *taken)
{
	size_t i;

	if (n >= 3 && memcmp(p, ".\r\n", 3) == 0) {
		*body = 0;
		*taken = 3;
		return 1;
	}
	for (i = 0; i + 5 <= n; i++)
		if (memcmp(p + i, "\r\n.\r\n", 5) == 0) {
			*body = i + 2;
			*taken = i + 5;
			return 1;
		}
	return 0;
}

/* Append the n bytes at p, which are without the end of data, to `to',
 * normalised. */
static __attribute__((unused)) void
ref_body(struct text *to, const char *p, size_t n, int dots)
{
	static struct text a, b;	/* kept, for speed */
	size_t i, k, eol;

	a.n = b.n = 0;
	text_add(&a, "", 0);
	text_add(&b, "", 0);
	text_add(to, "", 0);

	/* 1. A dot after CRLF, or at the start, was stuffed. */
	for (i = 0; i < n; i++)
		if (dots && p[i] == '.' && (i == 0 ||
		    (i >= 2 && p[i - 2] == '\r' && p[i - 1] == '\n')))
			continue;
		else
			text_add(&a, p + i, 1);

	/* 2. Remove CRs before an LF, and replace any other CR by a space. */
	for (i = 0; i < a.n; i = k) {
		for (k = i; k < a.n && a.p[k] == '\r'; k++)
			;
		if (k < a.n && a.p[k] == '\n')
			i = k;
		for (; i < k; i++)
			text_add(&b, " ", 1);
		if (k < a.n)
			text_add(&b, a.p + k++, 1);
	}

	/* 3. Remove NULs at the start of a line if a dot follows. */
	for (i = 0; i < b.n; i = eol + 1) {
		for (eol = i; eol < b.n && b.p[eol] != '\n'; eol++)
			;
		for (k = i; k < eol && b.p[k] == '\0'; k++)
			;
		if (k < eol && b.p[k] == '.')
			i = k;

		/* 4. End every line with CRLF, also the last one. */
		text_add(to, b.p + i, eol - i);
		text_add(to, "\r\n", 2);
	}
}

/* Returns the length of the mbox `From ' lines at the start of the message. */
static __attribute__((unused)) size_t
ref_top(const char *p, size_t n)
{
	const char *q = p, *from;

	for (;;) {
		for (from = q; from < p + n && *from == '>'; from++)
			;
		if (p + n - from < 5 || memcmp(from, "From ", 5) != 0)
			return q - p;
		q = (const char *)memchr(from, '\n', p + n - from) + 1;
	}
}

/* Returns where the header section that begins at top ends.  That is the first
 * line that neither is a header nor continues one. */
static __attribute__((unused)) size_t
ref_header(const char *p, size_t n, size_t top)
{
	size_t i, k;

	for (i = top; i < n; i = k + 1) {
		for (k = i; k < n && p[k] > ' ' && p[k] < 127 && p[k] != ':'; k++)
			;
		if (i > top && (p[i] == ' ' || p[i] == '\t'))
			;
		else if (k == i)
			return i;
		else {
			while (k < n && (p[k] == ' ' || p[k] == '\t'))
				k++;
			if (k == n || p[k] != ':')
				return i;
		}
		while (k < n && p[k] != '\n')
			k++;
		if (k == n)
			return i;	/* unreachable: whole lines only */
	}
	return n;
}

/* Append the message of n bytes at p to `to', with the header added in its
 * place. */
static __attribute__((unused)) void
ref_add_header(struct text *to, const char *p, size_t n, const char *header)
{
	size_t top = ref_top(p, n), at;

	at = strncmp(header, "Received:", 9) == 0 ? top : ref_header(p, n, top);
	text_add(to, p, at);
	text_puts(to, header);
	if (*header != '\0' && top < n && (p[top] == ' ' || p[top] == '\t'))
		text_add(to, "\r\n", 2);
	text_add(to, p + at, n - at);
}
