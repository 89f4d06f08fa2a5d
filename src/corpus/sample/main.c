/* SPDX-License-Identifier: MIT */
/*
 * Boots the kernel: "pebble" starts a shell, "pebble --test" tests itself.
 */
#include "kernel.h"

static int boot(void)
{
	memory_init();
	sched_init();
	return fs_init();
}

int main(int argc, char **argv)
{
	int error = boot();

	if (error) {
		con_printf("boot: %s\n", error_text(error));
		return 1;
	}
	if (argc > 1 && str_cmp(argv[1], "--test") == 0)
		return self_test();
	con_puts("Pebble is up. Try help.\n");
	shell_loop();
	return 0;
}
