/* SPDX-License-Identifier: MIT */
/*
 * The self-test: every part, by what it promises.
 */
#include "kernel.h"

static int passed, failed;

#define CHECK(condition)	check(condition, #condition, __LINE__)

static void check(int holds, const char *text, int line)
{
	if (holds) {
		passed++;
		return;
	}
	failed++;
	con_printf("test.c:%d: failed: %s\n", line, text);
}

static void test_lib(void)
{
	char text[16];
	int value = 7;

	CHECK(str_cmp("abc", "abd") < 0 && str_cmp("ab", "a") > 0);
	CHECK(str_copy(text, "a long string, cut", sizeof(text)) == 18);
	CHECK(str_cmp(text, "a long string, ") == 0);
	CHECK(str_to_int("-120", &value) == OK && value == -120);
	CHECK(str_to_int("12x", &value) == E_INVAL && value == -120);
	CHECK(str_to_int("99999999999", &value) == E_INVAL);

	format(text, sizeof(text), "%5d|%-4d|%03u", -42, 7, 9u);
	CHECK(str_cmp(text, "  -42|7   |009") == 0);
	format(text, sizeof(text), "%x %c%s%%", 0xbeefu, '<', "s");
	CHECK(str_cmp(text, "beef <s%") == 0);
	CHECK(format(text, 4, "%s", "counted") == 7);
	CHECK(str_cmp(text, "cou") == 0);
}

static void test_memory(void)
{
	struct memory_info before, info;
	unsigned char *block[40];
	size_t i, j, wrong = 0;

	memory_info(&before);
	for (i = 0; i < ARRAY_SIZE(block); i++) {
		block[i] = memory_alloc(i * 17 + 1);
		if (block[i])
			mem_fill(block[i], (unsigned char)i, i * 17 + 1);
		else
			wrong++;
	}
	CHECK(wrong == 0 && memory_check() == OK);
	for (i = 0; i < ARRAY_SIZE(block); i++)
		for (j = 0; j < i * 17 + 1; j++)
			wrong += block[i][j] != i;
	CHECK(wrong == 0);

	CHECK(memory_alloc(before.total) == NULL);
	CHECK(memory_free(block[0] + 1) == E_INVAL);
	for (i = 0; i < ARRAY_SIZE(block); i++)
		wrong += memory_free(block[i * 7 % ARRAY_SIZE(block)]) != OK;
	CHECK(wrong == 0 && memory_check() == OK);
	CHECK(memory_free(block[0]) == E_INVAL);
	memory_info(&info);
	CHECK(mem_cmp(&info, &before, sizeof(info)) == 0);
}

/* Writes its task's letter to a log at each step, n times. */
static char log_text[64];
static size_t log_length;

struct letters {
	char letter;
	int left;
	uint32_t pause;
};

static enum verdict write_letter(struct task *self)
{
	struct letters *letters = self->data;

	if (log_length + 1 < sizeof(log_text))
		log_text[log_length++] = letters->letter;
	log_text[log_length] = '\0';
	if (letters->pause)
		task_sleep(self, letters->pause);
	return --letters->left ? STEP_AGAIN : STEP_DONE;
}

static int log_is(const char *expected)
{
	int same = str_cmp(log_text, expected) == 0;

	log_length = 0;
	return same;
}

static struct semaphore items, room;
static int made, eaten;

static enum verdict produce(struct task *self)
{
	if (sem_take(self, &room)) {
		made++;
		sem_post(&items);
	}
	return made == 20 ? STEP_DONE : STEP_AGAIN;
}

static enum verdict consume(struct task *self)
{
	if (sem_take(self, &items)) {
		eaten++;
		sem_post(&room);
	}
	return eaten == 20 ? STEP_DONE : STEP_AGAIN;
}

static void test_sched(void)
{
	struct letters a = { 'a', 3, 0 }, b = { 'b', 3, 0 };
	struct letters c = { 'c', 3, 10 };
	uint32_t start = clock_now();
	int id[3];

	id[0] = task_create("a", 2, write_letter, &a);
	id[1] = task_create("b", 2, write_letter, &b);
	id[2] = task_create("c", 5, write_letter, &c);
	CHECK(id[0] > 0 && id[1] > id[0] && id[2] > id[1]);
	CHECK(sched_run(100) == OK);
	/* c goes first and then sleeps; a and b take turns. */
	CHECK(log_is("cabababcc"));
	CHECK(clock_now() - start == 23);

	room.count = 3;
	task_create("producer", 1, produce, NULL);
	task_create("consumer", 1, consume, NULL);
	CHECK(sched_run(200) == OK && eaten == 20 && made == 20);
	CHECK(room.count == 3 && items.count == 0);

	/* A greedy task cannot keep a humble one waiting for ever. */
	a.left = 1000;
	b.left = 1;
	task_create("greedy", PRIORITY_MAX, write_letter, &a);
	task_create("humble", 0, write_letter, &b);
	CHECK(sched_run(400) == OK && b.left == 0);
	CHECK(sched_run(1000) == OK && a.left == 0);

	task_create("stuck", 1, consume, NULL);
	eaten = 0;
	CHECK(sched_run(100) == E_DEADLOCK);
	sem_post(&items);
	eaten = 19;
	CHECK(sched_run(100) == OK && eaten == 20);
}

static void test_fs(void)
{
	struct memory_info before, after;
	struct file_info info;
	char text[8];
	size_t i;
	int dir, file, n = 0;

	memory_info(&before);
	dir = fs_create(FS_ROOT, "/etc", FILE_DIRECTORY);
	file = fs_create(dir, "motd", FILE_REGULAR);
	CHECK(dir > 0 && file > 0);
	CHECK(fs_create(FS_ROOT, "etc/motd", FILE_REGULAR) == E_EXIST);
	CHECK(fs_lookup(FS_ROOT, "//etc/../etc/./motd") == file);
	CHECK(fs_lookup(FS_ROOT, "etc/none") == E_NOENT);
	CHECK(fs_lookup(dir, "motd/x") == E_NOTDIR);

	/* A file of many blocks, and then one with a hole before its end. */
	for (i = 0; i < 500; i++) {
		format(text, sizeof(text), "%06u\n", (unsigned int)i);
		n += fs_write(file, i * 7, text, 7);
	}
	CHECK(n == 3500);
	CHECK(fs_read(file, 7 * 321 + 3, text, 4) == 4);
	CHECK(mem_cmp(text, "321\n", 4) == 0);
	CHECK(fs_read(file, 3498, text, 7) == 2);
	CHECK(fs_write(file, 100000, text, 1) == E_NOSPC);
	CHECK(fs_write(file, 5000, "end", 3) == 3);
	CHECK(fs_read(file, 4998, text, 5) == 5);
	CHECK(mem_cmp(text, "\0\0end", 5) == 0);
	CHECK(fs_info(file, &info) == OK && info.size == 5003);

	CHECK(fs_unlink(FS_ROOT, "etc") == E_NOTEMPTY);
	CHECK(fs_unlink(FS_ROOT, "etc/..") == E_INVAL);
	CHECK(fs_unlink(FS_ROOT, "etc/motd") == OK);
	CHECK(fs_unlink(FS_ROOT, "etc") == OK);
	CHECK(fs_info(file, &info) == E_NOENT);
	memory_info(&after);
	CHECK(mem_cmp(&before, &after, sizeof(before)) == 0);
}

/* Whether a command prints this and nothing else. */
static int prints(const char *line, const char *expected)
{
	char text[256];

	con_capture(text, sizeof(text));
	shell_run_line(line);
	con_release();
	return str_cmp(text, expected) == 0;
}

static void test_shell(void)
{
	CHECK(prints("mkdir home", ""));
	CHECK(prints("cd home", ""));
	CHECK(shell_run_line("echo \"one  two\" > note") == OK);
	CHECK(prints("cat note", "one  two\n"));
	CHECK(prints("ls", "-     9 note\n"));
	CHECK(prints("rm note", ""));
	CHECK(prints("cat note", "note: no such file or directory\n"));
	CHECK(prints("cd ..", "") && prints("rm home", ""));
	CHECK(prints("ls", ""));
	CHECK(prints("rm /", "/: invalid argument\n"));
	CHECK(prints("fly", "fly: no such command; try help\n"));
	CHECK(prints("count t 2", ""));
	CHECK(prints("run", "t: 2\nt: 1\nt: 0\n"));
}

/* Returns 0 if all is well. */
int self_test(void)
{
	test_lib();
	test_memory();
	test_sched();
	test_fs();
	test_shell();
	CHECK(memory_check() == OK);
	if (failed)
		con_printf("self-test: %d checks failed\n", failed);
	else
		con_printf("self-test: %d checks passed\n", passed);
	return failed != 0;
}
