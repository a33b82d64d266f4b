// The training loop: sample, step, grid, noise, update, as docs/engine.md says, and the budget's
// stop. Descriptors: 0 the job (Job below, learning rates, weights, the rows' sealed chunks), 1 the
// result, 2 a word on why it stopped. Twin: casemate/engine/train.py on the path `graph`.


namespace {

// Little endian, as it lies; written by casemate/engine/aot/run.py.
struct Job {
    char magic[8];
    uint64_t steps, units, slots, rows, processes;
    uint64_t threshold;            // a word below it takes a unit; with `all`, every unit
    uint64_t all, adam, flags;     // flags: 1 nesterov, 2 decoupled decay
    uint64_t chunk, rows_bytes;    // of the rows' stream
    double rate, sigma, normaliser, delta, epsilon;
    double momentum, beta1, beta2, eps, decay, average;
    uint8_t sampling[32], noise[32], more[32], rows_key[32], rows_prefix[8];
};

struct Result {
    char magic[8];
    uint64_t steps;
    double epsilon;
};

void *shared(uint64_t bytes) {
    void *p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    demand(p != MAP_FAILED, "memory: none left\n");
    return p;
}

// The rows as they come: starts (units + 1), which rows keep their schema (1 byte each, in whole
// words), the record for free places, and the records; each the inputs' bytes one after another.
class Rows {
   public:
    Rows(const Job &job, std::vector<uint8_t> bytes) : job(job), bytes(std::move(bytes)) {
        for (i64 i = 0; i < DATA_COUNT; i++) record += size_of(i);
        const uint64_t marks = 8 * (job.units + 1), valid = (job.rows + 7) / 8 * 8;
        demand(job.units < (1ull << 40) && job.rows < (1ull << 40) &&
                   this->bytes.size() == marks + valid + (job.rows + 1) * record,
               "rows: not of the size that the job says\n");
        starts = reinterpret_cast<const uint64_t *>(this->bytes.data());
        good = this->bytes.data() + marks;
        records = good + valid;
        for (uint64_t u = 0; u < job.units; u++)
            demand(starts[u] <= starts[u + 1] && starts[u + 1] <= job.rows &&
                       starts[u + 1] - starts[u] <= PER_UNIT,
                   "rows: units out of order\n");
        demand(starts[0] == 0 && starts[job.units] == job.rows, "rows: units out of order\n");
    }
    // Slot `slot` of a microbatch: a unit's valid rows in its places, or none (unit < 0).
    void put(i64 slot, int64_t unit, void *const *buffers, float *weights) const {
        i64 place = 0;
        uint64_t first = 0;
        for (uint64_t row = unit < 0 ? 0 : starts[unit]; unit >= 0 && row < starts[unit + 1]; row++)
            if (good[row]) {
                first = place == 0 ? row + 1 : first;
                copy(slot * PER_UNIT + place, row + 1, buffers);
                weights[slot * PER_UNIT + place++] = 1.0f;
            }
        for (; place < PER_UNIT; place++) {
            copy(slot * PER_UNIT + place, first, buffers);
            weights[slot * PER_UNIT + place] = 0.0f;
        }
    }
    static uint64_t size_of(i64 i) {
        const Input &in = INPUTS[DATA_FIRST + i];
        uint64_t bytes = static_cast<uint64_t>(width_of(in.type));
        for (i64 d = 1; d < in.dims; d++) bytes *= static_cast<uint64_t>(in.sizes[d]);
        return bytes;
    }

   private:
    void copy(i64 place, uint64_t number, void *const *buffers) const {
        const uint8_t *from = records + number * record;
        for (i64 i = 0; i < DATA_COUNT; i++) {
            const uint64_t size = size_of(i);
            std::memcpy(static_cast<uint8_t *>(buffers[i]) + place * size, from, size);
            from += size;
        }
    }
    const Job &job;
    std::vector<uint8_t> bytes;
    uint64_t record = 0;
    const uint64_t *starts;
    const uint8_t *good, *records;
};

// Which units a step takes, ascending; those past the last slot are dropped (engine/sampling.py).
void sample(const Job &job, uint64_t step, std::vector<int64_t> &chosen) {
    constexpr uint64_t SOME = 4096;
    uint64_t words[SOME];
    chosen.clear();
    for (uint64_t first = 0; first < job.units; first += SOME) {
        const uint64_t here = std::min(SOME, job.units - first);
        casemate_noise_blocks(job.sampling, step, first / 2, (here + 1) / 2,
                              reinterpret_cast<uint8_t *>(words));
        for (uint64_t i = 0; i < here; i++)
            if (job.all || words[i] < job.threshold)
                chosen.push_back(static_cast<int64_t>(first + i));
    }
    if (chosen.size() > job.slots) chosen.resize(job.slots);
}

// One process's part of each step's microbatches: number `mine` of them, `of` further on each time.
class Part {
   public:
    Part(const Job &job, const Rows &rows, void *const *fixed, uint64_t mine)
        : job(job), rows(rows), mine(mine) {
        for (i64 i = 0; i < INPUT_COUNT; i++) given[i] = i < DATA_FIRST ? fixed[i] : nullptr;
        for (i64 i = 0; i < DATA_COUNT; i++)
            given[DATA_FIRST + i] = std::aligned_alloc(64, up(Rows::size_of(i) * BATCH, 64));
        given[INPUT_COUNT - 1] = weights = static_cast<float *>(std::aligned_alloc(64, up(4 * BATCH, 64)));
    }
    // Adds its microbatches of a step to total (DIMENSION,), grid steps.
    void add(const std::vector<int64_t> &chosen, int64_t *total) {
        for (uint64_t first = mine * UNITS; first < job.slots; first += job.processes * UNITS) {
            for (uint64_t slot = 0; slot < UNITS; slot++)
                rows.put(static_cast<i64>(slot),
                         first + slot < chosen.size() ? chosen[first + slot] : -1,
                         given + DATA_FIRST, weights);
            step.run(given, [&](i64 i, const void *sum) {
                int64_t *to = total + OFFSETS[SUMS[i].tensor];
                const i64 n = SUMS[i].entries;
                if (SUMS[i].type == F32) {
                    norms_accumulate(to, static_cast<const float *>(sum), n, 1.0 / GRID);
                } else {
                    for (i64 j = 0; j < n; j++) to[j] += static_cast<const int64_t *>(sum)[j];
                }
            });
        }
    }

   private:
    const Job &job;
    const Rows &rows;
    uint64_t mine;
    Step step;
    void *given[INPUT_COUNT];
    float *weights;
};

// SGD, Adam and AdamW as torch.optim has them, on the noised mean (engine/optim.py).
class Update {
   public:
    explicit Update(const Job &job) : job(job), state(job.adam ? 2 * DIMENSION : DIMENSION) {}
    void operator()(float *w, const float *mean, uint64_t step, double lr) {
        const float decay = static_cast<float>(job.decay);
        if (!job.adam) {
            const float momentum = static_cast<float>(job.momentum), rate = static_cast<float>(-lr);
            for (i64 j = 0; j < DIMENSION; j++) {
                float g = mean[j] + decay * w[j];
                if (momentum != 0) {
                    float &v = state[j];
                    v = v * momentum + g;
                    g = job.flags & 1 ? g + momentum * v : v;
                }
                w[j] += rate * g;
            }
            return;
        }
        const float less = static_cast<float>(1.0 - lr * job.decay);
        const float b1 = static_cast<float>(1.0 - job.beta1), b2 = static_cast<float>(job.beta2);
        const float rest = static_cast<float>(1.0 - job.beta2), eps = static_cast<float>(job.eps);
        const double n = static_cast<double>(step + 1);
        const float root = static_cast<float>(std::sqrt(1.0 - std::pow(job.beta2, n)));
        const float rate = static_cast<float>(-lr / (1.0 - std::pow(job.beta1, n)));
        float *first = state.data(), *second = first + DIMENSION;
        for (i64 j = 0; j < DIMENSION; j++) {
            float g = mean[j];
            if (decay != 0) {
                if (job.flags & 2) w[j] *= less;
                else g += decay * w[j];
            }
            first[j] += b1 * (g - first[j]);
            second[j] = second[j] * b2 + rest * g * g;
            w[j] += rate * first[j] / (std::sqrt(second[j]) / root + eps);
        }
    }

   private:
    const Job &job;
    std::vector<float> state;
};

void check(const Job &job) {
    demand(!std::memcmp(job.magic, "CMNAT01\n", 8), "job: not of this form\n");
    demand(job.steps < (1ull << 40) && job.slots > 0 && job.slots % UNITS == 0 &&
               job.slots < (1ull << 32) && job.processes >= 1 && job.processes <= 64,
           "job: its counts are out of range\n");
    demand(job.rate > 0 && job.rate <= 1 && job.all == (job.rate == 1) &&
               static_cast<double>(job.threshold) <= job.rate * 0x1p64 && job.delta > 0 &&
               job.delta < 1 && job.epsilon >= 0 && job.normaliser > 0 && job.sigma > 0,
           "job: its privacy is not that of a private run\n");
}

// What zeroing out one unit moves a step's sum by at most (engine/batched.py, sensitivity).
double sensitivity() {
    return CLIP * (1 + 0x1p-20) + 2 * 0x1p-7 * CLIP +
           GRID * std::sqrt(static_cast<double>(DIMENSION));
}

int train() {
    Job job;
    read_whole(0, &job, sizeof job);
    check(job);
    std::vector<double> rates(job.steps);
    read_whole(0, rates.data(), 8 * job.steps);
    // Trained tensors lie one after another, where all processes see them.
    auto *weights = static_cast<float *>(shared(4 * up(DIMENSION, 16)));
    read_whole(0, weights, 4 * DIMENSION);
    void *fixed[INPUT_COUNT];
    for (i64 i = 0; i < DATA_FIRST; i++) {
        if (i < TRAINED_COUNT) {
            fixed[i] = weights + OFFSETS[i];
            continue;
        }
        const i64 bytes = bytes_of(INPUTS[i]);
        fixed[i] = std::aligned_alloc(64, up(bytes, 64));
        demand(fixed[i], "memory: none left\n");
        read_whole(0, fixed[i], static_cast<uint64_t>(bytes));
    }
    const Rows rows(job, unsealed(0, job.rows_key, job.rows_prefix, job.chunk, job.rows_bytes));

    // Each process has its own total; a byte down a pipe says that a step begins, one back that it
    // is summed.
    const uint64_t others = job.processes - 1;
    auto *totals = static_cast<int64_t *>(shared(8 * up(DIMENSION, 8) * job.processes));
    const auto total_of = [&](uint64_t i) { return totals + up(DIMENSION, 8) * i; };
    std::vector<int> go(others), done(others);
    std::vector<int64_t> chosen;
    for (uint64_t i = 0; i < others; i++) {
        int down[2], back[2];
        demand(!pipe2(down, 0) && !pipe2(back, 0), "process: no pipe\n");
        const pid_t child = fork();
        demand(child >= 0, "process: none to be had\n");
        if (child == 0) {
            prctl(PR_SET_PDEATHSIG, SIGKILL);
            close(down[1]);
            close(back[0]);
            lock(false);
            Part part(job, rows, fixed, i + 1);
            uint64_t step;
            while (read(down[0], &step, 8) == 8) {
                sample(job, step, chosen);
                std::memset(total_of(i + 1), 0, 8 * DIMENSION);
                part.add(chosen, total_of(i + 1));
                write_whole(back[1], &step, 8);
            }
            _exit(0);
        }
        close(down[0]);
        close(back[1]);
        go[i] = down[1];
        done[i] = back[0];
    }
    lock(false);

    Part part(job, rows, fixed, 0);
    Update update(job);
    const Account account(job.rate, job.sigma / sensitivity(), job.delta);
    std::vector<float> mean(DIMENSION);
    std::vector<double> average(job.average > 0 ? DIMENSION : 0);
    uint64_t step = 0;
    for (; step < job.steps; step++) {
        if (account.epsilon(static_cast<double>(step + 1)) > job.epsilon) break;   // the budget's stop
        for (const int fd : go) write_whole(fd, &step, 8);
        sample(job, step, chosen);
        int64_t *total = total_of(0);
        std::memset(total, 0, 8 * DIMENSION);
        part.add(chosen, total);
        for (uint64_t i = 0; i < others; i++) {
            uint64_t summed;
            read_whole(done[i], &summed, 8);
            for (i64 j = 0; j < DIMENSION; j++) total[j] += total_of(i + 1)[j];
        }
        add_noise(job.noise, job.more, step, job.sigma / GRID, total, DIMENSION);
        norms_finish(total, DIMENSION, GRID / job.normaliser, mean.data());
        update(weights, mean.data(), step, rates[step]);
        if (!average.empty()) {
            const double n = static_cast<double>(step + 1);
            const double own = step ? (1 - job.average) / -std::expm1(n * std::log(job.average)) : 1.0;
            for (i64 j = 0; j < DIMENSION; j++)
                average[j] = average[j] * (1 - own) + own * static_cast<double>(weights[j]);
        }
    }
    const Result result = {"CMNRES1", step, step ? account.epsilon(static_cast<double>(step)) : 0.0};
    if (!average.empty() && step)
        for (i64 j = 0; j < DIMENSION; j++) weights[j] = static_cast<float>(average[j]);
    write_whole(1, &result, sizeof result);
    write_whole(1, weights, 4 * DIMENSION);
    return 0;
}

}  // namespace

int main() {
    keep_to_itself();
    lock(true);
    _exit(train());
}
