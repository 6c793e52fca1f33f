package dev.lobit.core

import org.json.JSONArray
import org.json.JSONException
import org.json.JSONObject
import kotlin.math.sqrt

/** What is timed: a prompt of [tokens] tokens is read (`pp`), or as many are read one by one (`tg`), with [depth] in the cache before. */
data class Workload(val phase: String, val tokens: Int, val depth: Int) {
    /** Its name as llama-bench writes it, such as `tg64@d2048`. */
    val name: String get() = "$phase$tokens" + if (depth > 0) "@d$depth" else ""
}

/** What to time, and how to keep the device cool. */
data class BenchRequest(
    val prompts: List<Int> = listOf(128),
    val generates: List<Int> = listOf(64),
    val depths: List<Int> = listOf(0),
    val repetitions: Int = 5,
    val threads: Int = 0,
    /** Seconds of rest before each row, at most [LONGEST_REST] where the device stays hotter than [coolCelsius]. */
    val restSeconds: Int = 0,
    /** Battery temperature that a row waits for; null: rows do not wait. */
    val coolCelsius: Double? = null,
    /** Seconds of decoding without a pause at the end, to see how far the speed falls; 0: none. */
    val sustainedSeconds: Int = 0,
) {
    init {
        val lengths = prompts + generates
        if (lengths.isEmpty() || lengths.any { it < 1 } || depths.any { it < 0 } || depths.isEmpty() || repetitions < 1) {
            throw LobitException("these tests cannot be timed: lengths and repetitions are at least 1, depths at least 0")
        }
    }

    /** The tests: all prompts, then all generated texts, at each depth. */
    val workloads: List<Workload>
        get() = (depths.flatMap { depth -> prompts.map { Workload("pp", it, depth) } } +
            depths.flatMap { depth -> generates.map { Workload("tg", it, depth) } }).distinct()

    companion object {
        const val LONGEST_REST = 300

        /** Reads a request; what it does not say has its default. */
        fun of(json: JSONObject): BenchRequest = try {
            val plain = BenchRequest()
            BenchRequest(
                json.ints("prompts") ?: plain.prompts, json.ints("generates") ?: plain.generates, json.ints("depths") ?: plain.depths,
                json.optInt("repetitions", plain.repetitions), json.optInt("threads", 0), json.optInt("rest_seconds", 0),
                if (json.isNull("cool_celsius")) null else json.getDouble("cool_celsius"), json.optInt("sustained_seconds", 0),
            )
        } catch (error: JSONException) {
            throw LobitException("the request for a benchmark cannot be read: ${error.message}", error)
        }

        private fun JSONObject.ints(name: String) = optJSONArray(name)?.let { array -> List(array.length()) { array.getInt(it) } }
    }
}

/** Tells what the device is and how it is; where it does not know something it says null. */
interface Probe {
    /** Maker, model, system version, processor, memory. */
    fun device(): JSONObject

    /** Battery temperature and charge, thermal status, clock frequencies. */
    fun state(): JSONObject

    /** Memory of this process at its highest so far, bytes. */
    fun peakMemory(): Long

    /** Temperature of the battery in degrees Celsius. */
    fun celsius(): Double?
}

/**
 * Times an engine's calls as `lobit bench` does: until the logits are in Kotlin, one warm-up before the samples, always the same tokens.
 *
 * Rows of a phone's app share a process: their peak memory is that of the rows before too. [check] is called before each sample; it may
 * throw in order to cancel.
 */
class Bench(
    private val probe: Probe,
    private val clock: () -> Long = System::nanoTime,
    private val sleep: (Long) -> Unit = Thread::sleep,
    private val check: () -> Unit = {},
    private val open: (threads: Int) -> Engine,
) {
    /** Times all tests of a request. [progress] is called before each row, with its name and the numbers of done and of all rows. */
    fun run(request: BenchRequest, progress: (String, Int, Int) -> Unit): JSONObject {
        val base = probe.peakMemory()
        val start = clock()
        open(request.threads).use { engine ->
            val loadSeconds = (clock() - start) / 1e9
            val (fitting, long) = request.workloads.partition { it.depth + it.tokens <= engine.context }
            val rows = JSONArray()
            val all = fitting.size + if (request.sustainedSeconds > 0) 1 else 0
            fitting.forEachIndexed { index, work ->
                progress(work.name, index, all)
                rest(request)
                rows.put(row(engine, work, request.repetitions).put("load_seconds", loadSeconds).put("base_rss_bytes", base))
            }
            var sustained: Any = JSONObject.NULL
            if (request.sustainedSeconds > 0) {
                progress("sustained", fitting.size, all)
                rest(request)
                sustained = sustained(engine, request.sustainedSeconds)
            }
            progress("all rows", all, all)
            val skipped = JSONArray()
            for (work in long) {
                val why = "${work.depth + work.tokens} tokens are more than the context of ${engine.context}"
                skipped.put(JSONObject().put("test", work.name).put("why", why))
            }
            return JSONObject().put("rows", rows).put("skipped", skipped).put("sustained", sustained).put("device", probe.device())
        }
    }

    /** Waits as long as the request says, and until the device is cool, but not for ever. */
    private fun rest(request: BenchRequest) {
        var waited = 0
        while (waited < request.restSeconds || (isHot(request.coolCelsius) && waited < BenchRequest.LONGEST_REST)) {
            check()
            sleep(1000)
            waited++
        }
    }

    private fun isHot(limit: Double?): Boolean = limit != null && (probe.celsius() ?: return false) > limit

    private fun row(engine: Engine, work: Workload, repetitions: Int): JSONObject {
        val before = probe.state()
        val samples = JSONArray()
        val firsts = JSONArray()
        repeat(1 + repetitions) { number ->
            check()
            val (nanoseconds, first) = sample(engine, work)
            if (number > 0) {
                samples.put(nanoseconds)
                first?.let(firsts::put)
            }
        }
        return JSONObject()
            .put("phase", work.phase).put("tokens", work.tokens).put("depth", work.depth).put("samples_ns", samples)
            .put("first_token_ns", if (firsts.length() > 0) firsts else JSONObject.NULL)
            .put("peak_rss_bytes", probe.peakMemory()).put("before", before).put("after", probe.state())
    }

    /** Nanoseconds of the timed calls, and of a prompt until its likeliest next token is chosen. */
    private fun sample(engine: Engine, work: Workload): Pair<Long, Long?> {
        engine.reset()
        if (work.depth > 0) engine.prefill(tokens(work.depth))
        val timed = tokens(work.tokens)
        val start = clock()
        if (work.phase == "tg") {
            for (token in timed) engine.decode(token)
            return clock() - start to null
        }
        val logits = engine.prefill(timed)
        val end = clock()
        logits.indices.maxBy { logits[it] }
        return end - start to clock() - start
    }

    /** Decodes for so many seconds; the speed of each second or, where a token takes longer, of each token. */
    private fun sustained(engine: Engine, seconds: Int): JSONObject {
        val samples = JSONArray()
        val begin = clock()
        var start = begin
        var count = 0
        engine.reset()
        while (clock() - begin < seconds * SECOND) {
            check()
            if (engine.position == engine.context) engine.reset()
            engine.decode(tokens(1)[0])
            count++
            val now = clock()
            if (now - start >= SECOND) {
                samples.put(JSONArray().put((now - begin) / 1e9).put(count * 1e9 / (now - start)))
                start = now
                count = 0
            }
        }
        return JSONObject().put("seconds", seconds).put("samples", samples)
    }

    companion object {
        private const val SECOND = 1_000_000_000L

        /** Pseudo-random tokens, always the same; small, so that every vocabulary has them. */
        fun tokens(count: Int) = LongArray(count) { (it * 7919L + 17) % 89 + 3 }

        /** Tokens a second of each sample of a row. */
        fun speeds(row: JSONObject): List<Double> {
            val samples = row.getJSONArray("samples_ns")
            return List(samples.length()) { row.getInt("tokens") * 1e9 / samples.getLong(it) }
        }

        /** Mean and standard deviation of samples. */
        fun spread(values: List<Double>): Pair<Double, Double> {
            val mean = values.average()
            return mean to if (values.size > 1) sqrt(values.sumOf { (it - mean) * (it - mean) } / (values.size - 1)) else 0.0
        }
    }
}
