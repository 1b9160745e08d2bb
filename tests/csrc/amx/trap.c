/* trap.c: see trap.h. */
#define _GNU_SOURCE
#include "trap.h"

#if defined(__x86_64__) && defined(__linux__)
#include <signal.h>
#include <stdatomic.h>
#include <ucontext.h>

#include "tiles.h"

static atomic_size_t n_products;

/* An instruction of the form VEX.128.pp.0F38.W0 opcode /r, as the manual's chapter on instruction formats has it. */
typedef struct instruction {
    unsigned pp, opcode, mod, reg, rm, vvvv;
    uintptr_t address; /* of its operand in memory, without the index register */
    ptrdiff_t index;   /* what the scaled index register holds */
    size_t length;
} instruction;

static uintptr_t register_value(const ucontext_t *context, unsigned number) {
    static const int order[16] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                                  REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};
    return (uintptr_t)context->uc_mcontext.gregs[order[number]];
}

/* The operand in memory that begins with the ModRM byte at `at`; r, x, b: the high bits of registers. */
static void read_operand(instruction *i, const ucontext_t *context, const uint8_t *code, size_t at, unsigned x, unsigned b) {
    bool has_sib = i->rm == 4;
    size_t next = at + 1 + has_sib;
    unsigned base = i->rm;
    if (has_sib) {
        uint8_t sib = code[at + 1];
        unsigned index = (sib >> 3 & 7) | x << 3;
        base = sib & 7;
        if (index != 4) i->index = (ptrdiff_t)register_value(context, index) * (1 << (sib >> 6)); /* 4 = there is none */
    }
    int32_t displacement = 0;
    bool no_base = base == 5 && i->mod == 0;
    if (i->mod == 1) {
        displacement = (int8_t)code[next];
        next += 1;
    } else if (i->mod == 2 || no_base) {
        memcpy(&displacement, code + next, 4);
        next += 4;
    }
    i->length = next;
    uintptr_t start = register_value(context, base | b << 3);
    if (no_base) start = has_sib ? 0 : (uintptr_t)(code + next); /* relative to what follows */
    i->address = start + (uintptr_t)(intptr_t)displacement;
}

static bool read_instruction(instruction *i, const ucontext_t *context) {
    const uint8_t *code = (const uint8_t *)context->uc_mcontext.gregs[REG_RIP];
    memset(i, 0, sizeof *i);
    if (code[0] != 0xc4 || (code[1] & 0x1f) != 2 || (code[2] & 0x84) != 0) return false; /* three-byte VEX, 0F38, W0, 128 */
    i->pp = code[2] & 3, i->vvvv = ~(unsigned)code[2] >> 3 & 15, i->opcode = code[3];
    i->mod = code[4] >> 6, i->reg = code[4] >> 3 & 7, i->rm = code[4] & 7;
    if (i->mod == 3) i->length = 5;
    else read_operand(i, context, code, 4, !(code[1] & 0x40), !(code[1] & 0x20));
    return true;
}

static bool execute(const instruction *i) {
    enum { NONE, P66, PF3, PF2 };
    bool memory = i->mod != 3;
    uint8_t *at = (uint8_t *)i->address; /* NOLINT: the address that the instruction computes */
    if (i->opcode == 0x49 && i->pp == NONE && memory && i->reg == 0) tile_loadconfig(at + i->index);
    else if (i->opcode == 0x49 && i->pp == NONE && !memory && i->reg == 0 && i->rm == 0) tile_release();
    else if (i->opcode == 0x49 && i->pp == PF2 && !memory && i->rm == 0) tile_zero(i->reg);
    else if (i->opcode == 0x4b && (i->pp == PF2 || i->pp == P66) && memory && i->rm == 4) tile_loadd(i->reg, at, i->index);
    else if (i->opcode == 0x4b && i->pp == PF3 && memory && i->rm == 4) tile_stored(i->reg, at, i->index);
    else if (i->opcode == 0x5e && i->pp == PF2 && !memory) {
        tile_dpbssd(i->reg, i->rm, i->vvvv);
        atomic_fetch_add_explicit(&n_products, 1, memory_order_relaxed);
    } else return false;
    return true;
}

static void on_illegal_instruction(int number, siginfo_t *info, void *context) {
    ucontext_t *c = context;
    instruction i;
    (void)info;
    if (read_instruction(&i, c) && execute(&i)) c->uc_mcontext.gregs[REG_RIP] += (greg_t)i.length;
    else signal(number, SIG_DFL); /* it happens again, and ends the program */
}

bool emulate_amx(void) {
    struct sigaction action = {.sa_sigaction = on_illegal_instruction, .sa_flags = SA_SIGINFO | SA_NODEFER};
    return sigaction(SIGILL, &action, NULL) == 0;
}

size_t n_emulated_products(void) { return atomic_load(&n_products); }

bool has_live_tiles(void) {
    for (int i = 0; i < N_TILES; i++)
        if (tiles[i].n_rows > 0) return true;
    return false;
}

#else
bool emulate_amx(void) { return false; }
size_t n_emulated_products(void) { return 0; }
bool has_live_tiles(void) { return false; }
#endif
