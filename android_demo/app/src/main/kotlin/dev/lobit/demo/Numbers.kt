package dev.lobit.demo

import java.util.Locale

/** Bytes as `78.2 MB` (10⁶ bytes), as `lobit bench` writes them. */
fun size(bytes: Long): String = when {
    bytes < 1_000 -> "$bytes B"
    bytes < 1_000_000 -> rounded(bytes / 1e3, 1) + " kB"
    bytes < 1_000_000_000 -> rounded(bytes / 1e6, 1) + " MB"
    else -> rounded(bytes / 1e9, 2) + " GB"
}

/** Parameters as `264 K`, `124.6 M`, `1.08 B`. */
fun count(number: Long): String = when {
    number < 1_000_000 -> rounded(number / 1e3, 0) + " K"
    number < 1_000_000_000 -> rounded(number / 1e6, 1) + " M"
    else -> rounded(number / 1e9, 2) + " B"
}

/** A number with so many digits after the point. */
fun rounded(number: Double, digits: Int): String = String.format(Locale.getDefault(), "%.${digits}f", number)
