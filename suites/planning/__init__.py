"""What a memory of a given size needs in bytes and time, on paper: costs measured at smaller sizes, and how they grow.

    amounts       numbers as people write them: 10M, 64Ki, 24GiB
    question      what is asked: so many memories of so many keys, so many queries a step
    laws          a cost as a sum of terms such as sqrt(n), fitted to measured points, with its uncertainty
    growth        which terms the cost of which backend is made of, and what that assumes of its options
    needed_bytes  bytes of keys, values and index by formula
    calibration   the measured points: a file with the machine they are of
    measuring     takes them
    planning      the answer for one machine

Costs are those of one memory on one thread pool; what adds memories up is in `planning` alone, so that another way to
place them (on shards, over a network) is another file beside it.
"""
