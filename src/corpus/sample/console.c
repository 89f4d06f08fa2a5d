/* SPDX-License-Identifier: MIT */
/*
 * The console: characters to and from the host.
 *
 * Output can be captured in a buffer instead. The shell does this for
 * "command > file", and the self-test to see what a command printed.
 */
#include <stdio.h>

#include "kernel.h"

static struct {
	char *buffer;		/* NULL while output goes to the host */
	size_t room;
	size_t length;
} capture;

void con_putc(char c)
{
	if (!capture.buffer)
		putchar(c);
	else if (capture.length + 1 < capture.room)
		capture.buffer[capture.length++] = c;
}

void con_puts(const char *s)
{
	while (*s)
		con_putc(*s++);
}

void con_printf(const char *fmt, ...)
{
	char text[256];
	va_list args;

	va_start(args, fmt);
	vformat(text, sizeof(text), fmt, args);
	va_end(args);
	con_puts(text);
}

/* From now on output goes to the buffer. What does not fit is lost. */
void con_capture(char *buffer, size_t room)
{
	capture.buffer = buffer;
	capture.room = room;
	capture.length = 0;
}

/* Ends the text, gives output back to the host, returns the length. */
size_t con_release(void)
{
	if (capture.buffer && capture.room)
		capture.buffer[capture.length] = '\0';
	capture.buffer = NULL;
	return capture.length;
}

/*
 * Reads a line without its end. A longer line is cut, not split.
 * Returns its length, or E_NOENT when there is no more input.
 */
int con_getline(char *line, size_t room)
{
	size_t n = 0;
	int c;

	fflush(stdout);
	while ((c = getchar()) != EOF && c != '\n')
		if (n + 1 < room)
			line[n++] = (char)c;
	if (c == EOF && n == 0)
		return E_NOENT;
	line[n] = '\0';
	return (int)n;
}
