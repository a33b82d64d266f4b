// seccomp (Linux, x86-64): from the first line of main only what is listed can be asked of the
// kernel, and once the processes are there nothing but reading and writing what was inherited,
// memory that holds no code, and the end. No file, socket, thread or program.

#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>

namespace {

constexpr int ALWAYS[] = {SYS_read, SYS_write, SYS_exit, SYS_exit_group, SYS_rt_sigreturn, SYS_brk,
                          SYS_munmap, SYS_madvise};
// What it takes to start the other processes of a run and to lock again.
constexpr int FIRST[] = {SYS_clone, SYS_pipe2, SYS_close, SYS_set_robust_list, SYS_rseq, SYS_gettid,
                         SYS_prctl, SYS_seccomp, SYS_rt_sigprocmask};

void lock(bool starting) {
    sock_filter code[64];
    unsigned short n = 0;
    const auto load = [&](size_t at) {
        code[n++] = BPF_STMT(BPF_LD | BPF_W | BPF_ABS, static_cast<unsigned>(at));
    };
    const auto allow_if = [&](unsigned value) {
        code[n++] = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, value, 0, 1);
        code[n++] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    };
    load(offsetof(seccomp_data, arch));
    code[n++] = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 1, 0);
    code[n++] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    load(offsetof(seccomp_data, nr));
    for (const int call : ALWAYS) allow_if(static_cast<unsigned>(call));
    for (const int call : FIRST)
        if (starting) allow_if(static_cast<unsigned>(call));
    // Memory of its own, never with code: mmap and mremap.
    allow_if(SYS_mremap);
    code[n++] = BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 3);
    load(offsetof(seccomp_data, args[2]));
    code[n++] = BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, PROT_EXEC, 1, 0);
    code[n++] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    code[n++] = BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS);
    const sock_fprog program = {n, code};
    demand(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) &&
               !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program),
           "lock: the kernel has no seccomp\n");
}

// What a worker has beside (casemate/worker/lock.py): its end is this process's, nobody of the same
// user looks in, and where there is no limit to it no page goes to the swap.
void keep_to_itself() {
    rlimit locked;
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    demand(!prctl(PR_SET_DUMPABLE, 0), "lock: it can be looked into\n");
    if (!getrlimit(RLIMIT_MEMLOCK, &locked) && locked.rlim_cur == RLIM_INFINITY)
        demand(!mlockall(MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT), "lock: pages may go to the swap\n");
}

}  // namespace
