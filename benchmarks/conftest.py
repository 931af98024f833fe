"""A line per peer under the tables: time and nanoseconds per element, and what they were measured on."""

import platform

import pyx_xent


def cpu_name():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [b for b in getattr(session, "benchmarks", []) if b]
    if not benchmarks:
        return
    settings = pyx_xent.show_config()
    terminalreporter.section("per element")
    terminalreporter.write_line(
        f"{cpu_name()}, {settings['num_threads']} threads, {settings['isa_active']}, numpy {settings['numpy']}, "
        f"pyx_xent {settings['version']}"
    )
    for group in dict.fromkeys(b.group for b in benchmarks):
        terminalreporter.write_line(group)
        for b in sorted((b for b in benchmarks if b.group == group), key=lambda b: b.stats.min):
            terminalreporter.write_line(
                f"    {b.params['name']:34}{b.stats.min * 1e6:12.1f} µs min{b.stats.median * 1e6:12.1f} µs median"
                f"{b.stats.min / b.extra_info['elements'] * 1e9:10.3f} ns/element"
            )
