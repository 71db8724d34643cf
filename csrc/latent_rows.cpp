// Rows of latent shards, gathered from open files into one batch: read, and checked for NaN, infinity and their checksums while still in
// the cache.
//
// A row of 32 KiB comes out of the page cache in 5 us. Called from Python row by row, two threads spend most of that again on waiting for
// the interpreter; one call a batch leaves them to the system. Rows that are not in the page cache are all announced to the disk before the
// first is waited for.
#include <cerrno>
#include <cstdint>
#include <fcntl.h>
#include <sys/uio.h>
#include <type_traits>
#include <unistd.h>
#include <vector>

namespace {

enum Fault : int32_t { none = 0, end_of_file = -1, not_finite = -2, damaged = -3 };  // above 0: errno

// Whether no value has all bits of its exponent set, and the values as signed integers add up to `sum` modulo 2^32; a sum of -1 is none.
template <typename Bits>
int32_t checked(const char* row, int64_t bytes, Bits exponent, int64_t sum) {
    const Bits* values = reinterpret_cast<const Bits*>(row);
    Bits found = 0;
    uint32_t total = 0;
    for (int64_t i = 0; i < bytes / int64_t(sizeof(Bits)); ++i) {
        found |= Bits((values[i] & exponent) == exponent);
        total += uint32_t(int32_t(std::make_signed_t<Bits>(values[i])));
    }
    if (found != 0) return not_finite;
    return sum >= 0 && int64_t(total) != sum ? damaged : none;
}

int32_t fault_of(const char* row, int64_t bytes, int32_t item_bytes, uint32_t exponent, int64_t sum) {
    return item_bytes == 4 ? checked<uint32_t>(row, bytes, exponent, sum) : checked<uint16_t>(row, bytes, uint16_t(exponent), sum);
}

// Whether the whole row was in memory and is now at `to`; if not, the disk is asked for it.
bool read_from_memory(int32_t file, char* to, int64_t bytes, int64_t offset) {
#ifdef RWF_NOWAIT
    const iovec whole{to, size_t(bytes)};
    if (preadv2(file, &whole, 1, offset, RWF_NOWAIT) == bytes) return true;
#endif
#ifdef POSIX_FADV_WILLNEED
    posix_fadvise(file, offset, bytes, POSIX_FADV_WILLNEED);
#endif
    return false;
}

int32_t read_all(int32_t file, char* to, int64_t bytes, int64_t offset) {
    while (bytes > 0) {
        const ssize_t got = pread(file, to, bytes, offset);  // may be short, which is legal
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return end_of_file;
        to += got, offset += got, bytes -= got;
    }
    return none;
}

}  // namespace

// Row i: `row_bytes` at offsets[i] of files[i] -> out + places[i] * row_bytes. `exponent`: the bits of one in a value of `item_bytes`, 2 or 4.
// `sums`: of each row, or -1. Returns `rows`, or an i that could not be read, is not finite or not what was written, with the cause in *fault.
extern "C" int64_t gather_rows(const int32_t* files, const int64_t* offsets, const int64_t* places, int64_t rows, int64_t row_bytes,
                               int32_t item_bytes, uint32_t exponent, const int64_t* sums, char* out, int32_t* fault) {
    const auto place = [&](int64_t i) { return out + places[i] * row_bytes; };
    std::vector<bool> there(rows);
    for (int64_t i = 0; i < rows; ++i) {
        there[i] = read_from_memory(files[i], place(i), row_bytes, offsets[i]);
        if (!there[i]) continue;
        *fault = fault_of(place(i), row_bytes, item_bytes, exponent, sums[i]);
        if (*fault != none) return i;
    }
    for (int64_t i = 0; i < rows; ++i) {
        if (there[i]) continue;
        *fault = read_all(files[i], place(i), row_bytes, offsets[i]);
        if (*fault == none) *fault = fault_of(place(i), row_bytes, item_bytes, exponent, sums[i]);
        if (*fault != none) return i;
    }
    return rows;
}
