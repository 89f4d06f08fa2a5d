/* SPDX-License-Identifier: MIT */
/*
 * The shell: a line is a command, its arguments, and perhaps "> file".
 */
#include "kernel.h"

#define WORDS		8
#define LINE		128
#define OUTPUT		2048

static int here = FS_ROOT;
static int leaving;

/* Prints why a command failed, and hands the error on. */
static int complain(const char *what, int error)
{
	con_printf("%s: %s\n", what, error_text(error));
	return error;
}

static int cmd_echo(char **words)
{
	while (*++words)
		con_printf("%s%s", *words, words[1] ? " " : "");
	con_putc('\n');
	return OK;
}

static int cmd_cat(char **words)
{
	struct file_info info;
	int inode = fs_lookup(here, words[1]);
	size_t offset;
	char c;

	if (inode < 0)
		return complain(words[1], inode);
	if (fs_info(inode, &info) == OK && info.type == FILE_DIRECTORY)
		return complain(words[1], E_ISDIR);
	for (offset = 0; fs_read(inode, offset, &c, 1) == 1; offset++)
		con_putc(c);
	return OK;
}

static int cmd_ls(char **words)
{
	const char *path = words[1] ? words[1] : ".";
	int directory = fs_lookup(here, path), error = directory;
	struct dir_entry entry;
	struct file_info info;
	size_t i;

	for (i = 0; directory >= 0; i++) {
		error = fs_entry(directory, i, &entry);
		if (error)
			break;
		if (!entry.inode || entry.name[0] == '.')
			continue;
		fs_info(entry.inode, &info);
		con_printf("%c %5u %s\n",
			   info.type == FILE_DIRECTORY ? 'd' : '-',
			   (unsigned int)info.size, entry.name);
	}
	return error == E_NOENT && i > 0 ? OK : complain(path, error);
}

static int cmd_cd(char **words)
{
	const char *path = words[1] ? words[1] : "/";
	int directory = fs_lookup(here, path);
	struct file_info info;

	if (directory < 0)
		return complain(path, directory);
	fs_info(directory, &info);
	if (info.type != FILE_DIRECTORY)
		return complain(path, E_NOTDIR);
	here = directory;
	return OK;
}

static int cmd_mkdir(char **words)
{
	int inode = fs_create(here, words[1], FILE_DIRECTORY);

	return inode < 0 ? complain(words[1], inode) : OK;
}

static int cmd_rm(char **words)
{
	int inode = fs_lookup(here, words[1]), error;

	/* The directory one stands in must not go away. */
	error = inode == here ? E_INVAL : fs_unlink(here, words[1]);
	return error ? complain(words[1], error) : OK;
}

static int cmd_free(char **words)
{
	struct memory_info info;

	(void)words;
	memory_info(&info);
	con_printf("%u of %u bytes free, %u blocks in use\n",
		   info.free, info.total, info.blocks);
	return OK;
}

static int cmd_ps(char **words)
{
	static const char *const state[] = {
		"free", "ready", "asleep", "waiting"
	};
	const struct task *task;
	int i;

	(void)words;
	con_printf("clock %u\n", (unsigned int)clock_now());
	for (i = 0; (task = task_get(i)); i++)
		if (task->state != TASK_FREE)
			con_printf("%3d %-15s %-7s priority %d, %u steps\n",
				   task->id, task->name, state[task->state],
				   task->priority, (unsigned int)task->steps);
	return OK;
}

/* A task that counts down, a number each ten ticks. */
static enum verdict count_down(struct task *self)
{
	int *left = self->data;

	con_printf("%s: %d\n", self->name, *left);
	if ((*left)-- > 0) {
		task_sleep(self, 10);
		return STEP_AGAIN;
	}
	memory_free(left);
	return STEP_DONE;
}

static int cmd_count(char **words)
{
	int *left, from, id;

	if (str_to_int(words[2], &from))
		return complain(words[2], E_INVAL);
	left = memory_alloc(sizeof(*left));
	if (!left)
		return complain(words[1], E_NOMEM);
	*left = from;
	id = task_create(words[1], 1, count_down, left);
	if (id < 0) {
		memory_free(left);
		return complain(words[1], id);
	}
	return OK;
}

static int cmd_run(char **words)
{
	int ticks = 1000, error;

	if (words[1] && (str_to_int(words[1], &ticks) || ticks < 0))
		return complain(words[1], E_INVAL);
	error = sched_run((uint32_t)ticks);
	return error ? complain("run", error) : OK;
}

static int cmd_exit(char **words)
{
	(void)words;
	leaving = 1;
	return OK;
}

static int cmd_help(char **words);

static const struct command {
	const char *name;
	int arguments;		/* how many it needs at least */
	int (*run)(char **words);
	const char *help;
} commands[] = {
	{ "cat", 1, cmd_cat, "FILE: print a file" },
	{ "cd", 0, cmd_cd, "[DIR]: go to a directory" },
	{ "count", 2, cmd_count, "NAME N: make a task that counts down" },
	{ "echo", 0, cmd_echo, "[WORD...]: print words" },
	{ "exit", 0, cmd_exit, ": leave the shell" },
	{ "free", 0, cmd_free, ": how much memory there is" },
	{ "help", 0, cmd_help, ": this list" },
	{ "ls", 0, cmd_ls, "[DIR]: list a directory" },
	{ "mkdir", 1, cmd_mkdir, "DIR: make a directory" },
	{ "ps", 0, cmd_ps, ": list the tasks" },
	{ "rm", 1, cmd_rm, "FILE: remove a file or an empty directory" },
	{ "run", 0, cmd_run, "[TICKS]: let the tasks run" }
};

static int cmd_help(char **words)
{
	size_t i;

	(void)words;
	for (i = 0; i < ARRAY_SIZE(commands); i++)
		con_printf("%-6s%s\n", commands[i].name, commands[i].help);
	con_puts("A line may end in > FILE.\n");
	return OK;
}

/* Cuts a line into words in place, NULL last; quotes hold words together. */
static int split(char *line, char **words)
{
	int count = 0;

	for (;;) {
		char end = ' ';

		while (*line == ' ' || *line == '\t')
			line++;
		words[count] = NULL;
		if (!*line)
			return count;
		if (count == WORDS)
			return E_INVAL;
		if (*line == '"') {
			end = '"';
			line++;
		}
		words[count++] = line;
		while (*line && *line != end)
			line++;
		if (*line)
			*line++ = '\0';
	}
}

static int run_words(char **words)
{
	size_t i;
	int count = 0;

	while (words[count])
		count++;

	for (i = 0; i < ARRAY_SIZE(commands); i++) {
		if (str_cmp(words[0], commands[i].name) != 0)
			continue;
		if (count - 1 < commands[i].arguments)
			return complain(words[0], E_INVAL);
		return commands[i].run(words);
	}
	con_printf("%s: no such command; try help\n", words[0]);
	return E_NOENT;
}

/* Runs words with their output written to a file, the old text replaced. */
static int run_into(const char *path, char **words)
{
	int inode = fs_lookup(here, path), error, n;
	struct file_info info;
	char *text;
	size_t length;

	if (inode == E_NOENT)
		inode = fs_create(here, path, FILE_REGULAR);
	if (inode < 0)
		return complain(path, inode);
	if (fs_info(inode, &info) == OK && info.type == FILE_DIRECTORY)
		return complain(path, E_ISDIR);
	text = memory_alloc(OUTPUT);
	if (!text)
		return complain(path, E_NOMEM);
	con_capture(text, OUTPUT);
	error = run_words(words);
	length = con_release();
	fs_truncate(inode);
	n = fs_write(inode, 0, text, length);
	memory_free(text);
	return n < 0 ? complain(path, n) : error;
}

int shell_run_line(const char *line)
{
	char copy[LINE], *words[WORDS + 1];
	int count;

	if (str_copy(copy, line, sizeof(copy)) >= sizeof(copy))
		return complain("line", E_INVAL);
	count = split(copy, words);
	if (count < 0)
		return complain("line", count);
	if (count == 0)
		return OK;
	if (count > 2 && str_cmp(words[count - 2], ">") == 0) {
		words[count - 2] = NULL;
		return run_into(words[count - 1], words);
	}
	return run_words(words);
}

void shell_loop(void)
{
	char line[LINE];

	while (!leaving) {
		con_puts("$ ");
		if (con_getline(line, sizeof(line)) < 0)
			break;
		shell_run_line(line);
	}
}
