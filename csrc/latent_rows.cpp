// Rows of latent shards, gathered from open files into one batch: read, and checked for NaN and infinity while still in the cache.
//
// A row of 32 KiB comes out of the page cache in 5 us. Called from Python row by row, two threads spend most of that again on waiting for
// the interpreter; one call a batch leaves them to the system.
#include <cerrno>
#include <cstdint>
#include <unistd.h>

namespace {

enum Fault : int32_t { none = 0, end_of_file = -1, not_finite = -2 };  // above 0: errno

// Whether any value has all bits of its exponent set.
template <typename Bits>
bool any_not_finite(const char* row, int64_t bytes, Bits exponent) {
    const Bits* values = reinterpret_cast<const Bits*>(row);
    Bits found = 0;
    for (int64_t i = 0; i < bytes / int64_t(sizeof(Bits)); ++i) found |= Bits((values[i] & exponent) == exponent);
    return found != 0;
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
// Returns `rows`, or the first i that could not be read or is not finite, with the cause in *fault.
extern "C" int64_t gather_rows(const int32_t* files, const int64_t* offsets, const int64_t* places, int64_t rows, int64_t row_bytes,
                               int32_t item_bytes, uint32_t exponent, char* out, int32_t* fault) {
    for (int64_t i = 0; i < rows; ++i) {
        char* row = out + places[i] * row_bytes;
        *fault = read_all(files[i], row, row_bytes, offsets[i]);
        if (*fault == none) {
            const bool bad = item_bytes == 4 ? any_not_finite<uint32_t>(row, row_bytes, exponent)
                                             : any_not_finite<uint16_t>(row, row_bytes, uint16_t(exponent));
            if (bad) *fault = not_finite;
        }
        if (*fault != none) return i;
    }
    return rows;
}
