/*
 * A loop whose registers are known at every instruction (x86-64).
 *
 *     long register_loop_sse(const uint64_t gpr[10], const uint8_t vec[15][32],
 *                            volatile int *stop, volatile uint64_t *turns);
 *
 * Ten general registers, the argument registers, fifteen vector registers (in the AVX loop with
 * their upper halves, which a signal frame without extended state would lose), MXCSR and the red
 * zone hold a pattern that every turn compares. In between rax holds -ERESTARTSYS: a tracer that
 * makes the kernel take this for an interrupted system call sends it back to code that is none.
 * Returns 0 after *stop, else which comparison failed: 1 argument registers, 2 general registers,
 * 3 rax, 4 red zone, 5 vector registers, 6 MXCSR.
 */
#ifndef REGISTERS_H
#define REGISTERS_H

#include <stdint.h>

#if !defined(__x86_64__)
#error "the register pattern is written for x86-64"
#endif

long register_loop_sse(const uint64_t *gpr, const uint8_t (*vec)[32], volatile int *stop,
		       volatile uint64_t *turns);
long register_loop_avx(const uint64_t *gpr, const uint8_t (*vec)[32], volatile int *stop,
		       volatile uint64_t *turns);

__asm__(
	".macro each_gpr op\n"
	".set i, 0\n"
	".irp reg, rbx, rbp, r8, r9, r10, r11, r12, r13, r14, r15\n"
	"\\op \\reg\n"
	".set i, i + 1\n"
	".endr\n"
	".endm\n"

	/* red zone: slots 1-4 the arguments, 5-14 the patterns, 15 two of them again, 16 scratch */
	".macro load_gpr reg\n"
	"mov 8*i(%rdi), %\\reg\n"
	"mov %\\reg, -8*(i + 5)(%rsp)\n"
	".endm\n"
	".macro check_gpr reg\n"
	"cmp 8*i(%rdi), %\\reg\n"
	"jne 2f\n"
	"cmp -8*(i + 5)(%rsp), %\\reg\n"
	"jne 4f\n"
	".endm\n"
	".macro check_rax\n"
	"cmp $-512, %rax\n"
	"jne 3f\n"
	".endm\n"

	".macro load_sse n\n"
	"movdqu 32*\\n(%rsi), %xmm\\n\n"
	".endm\n"
	".macro check_sse n\n"
	"movdqu 32*\\n(%rsi), %xmm15\n"
	"pcmpeqb %xmm\\n, %xmm15\n"
	"pmovmskb %xmm15, %eax\n"
	"cmp $0xffff, %eax\n"
	"jne 5f\n"
	".endm\n"
	".macro load_avx n\n"
	"vmovdqu 32*\\n(%rsi), %ymm\\n\n"
	".endm\n"
	".macro check_avx n\n"
	"vmovdqu 32*\\n(%rsi), %ymm15\n"
	"vxorps %ymm\\n, %ymm15, %ymm15\n"
	"vptest %ymm15, %ymm15\n"
	"jnz 5f\n"
	".endm\n"
	".macro each_vec op\n"
	".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14\n"
	"\\op \\n\n"
	".endr\n"
	".endm\n"

	".macro register_loop kind\n"
	".globl register_loop_\\kind\n"
	".type register_loop_\\kind, @function\n"
	"register_loop_\\kind:\n"
	"push %rbx; push %rbp; push %r12; push %r13; push %r14; push %r15\n"
	"mov %rdi, -8(%rsp)\n"
	"mov %rsi, -16(%rsp)\n"
	"mov %rdx, -24(%rsp)\n"
	"mov %rcx, -32(%rsp)\n"
	"each_gpr load_gpr\n"
	"mov %rbx, -120(%rsp)\n"
	"each_vec load_\\kind\n"
	"movl $0x5f80, -128(%rsp)\n" /* round up: not what a fresh state has */
	"ldmxcsr -128(%rsp)\n"
	"1: mov $-512, %rax\n"
	"cmp -8(%rsp), %rdi\n"
	"jne 8f\n"
	"cmp -16(%rsp), %rsi\n"
	"jne 8f\n"
	"cmp -24(%rsp), %rdx\n"
	"jne 8f\n"
	"cmp -32(%rsp), %rcx\n"
	"jne 8f\n"
	"each_gpr check_gpr\n"
	"cmp -120(%rsp), %rbx\n"
	"jne 4f\n"
	"check_rax\n"
	"each_vec check_\\kind\n"
	"stmxcsr -128(%rsp)\n"
	"mov $-512, %rax\n"
	/* the processor may set the sticky exception flags; control and rounding are ours */
	"testl $0x4000, -128(%rsp)\n"
	"jz 6f\n"
	"check_rax\n"
	"incq (%rcx)\n"
	"cmpl $0, (%rdx)\n"
	"je 1b\n"
	"xor %eax, %eax\n"
	"jmp 9f\n"
	"2: mov $2, %eax; jmp 9f\n"
	"3: mov $3, %eax; jmp 9f\n"
	"4: mov $4, %eax; jmp 9f\n"
	"5: mov $5, %eax; jmp 9f\n"
	"6: mov $6, %eax; jmp 9f\n"
	"8: mov $1, %eax\n"
	"9: movl $0x1f80, -128(%rsp)\n"
	"ldmxcsr -128(%rsp)\n"
	"pop %r15; pop %r14; pop %r13; pop %r12; pop %rbp; pop %rbx\n"
	"ret\n"
	".size register_loop_\\kind, . - register_loop_\\kind\n"
	".endm\n"

	".text\n"
	"register_loop sse\n"
	"register_loop avx\n");

#endif
