package dev.lobit.demo

import android.app.Activity
import android.os.Looper
import dev.lobit.core.Bundle
import dev.lobit.core.Counts
import dev.lobit.core.Engine
import dev.lobit.core.LobitException
import dev.lobit.core.Runtime
import dev.lobit.core.TextEngine
import dev.lobit.demo.service.Listener
import java.io.File
import java.io.IOException
import java.io.InputStream
import java.util.concurrent.CountDownLatch
import java.util.concurrent.TimeUnit
import java.util.concurrent.atomic.AtomicInteger
import org.junit.Assert.assertTrue
import org.robolectric.Shadows.shadowOf

/** A runtime whose text engine writes given words, one whenever [word] is called, or all at once. */
class FakeRuntime : Runtime {
    override val backends = listOf("FakeBackend")
    var words = listOf("Once", " there", " was")
    var failure: Throwable? = null
    var byHand = false
    val prompts = mutableListOf<String>()

    /** Engines that were asked for, and those that were closed. */
    val asked = AtomicInteger()
    val closed = AtomicInteger()

    /** Where it is set, no engine is there before it is open. */
    @Volatile var gate: CountDownLatch? = null

    @Volatile private var stopped = false
    private val steps = java.util.concurrent.Semaphore(0)

    /** Lets the engine write one more word. */
    fun word() = steps.release()

    private fun load() {
        asked.incrementAndGet()
        gate?.await()
    }

    override fun textEngine(bundle: Bundle): TextEngine = object : TextEngine {
        init {
            load()
        }

        override fun generate(prompt: String, length: Int, temperature: Float, onText: (String) -> Unit): Counts {
            failure?.let { throw it }
            prompts += prompt
            stopped = false
            var written = 0
            for (word in words) {
                while (byHand && !stopped && !steps.tryAcquire(10, TimeUnit.MILLISECONDS)) continue
                if (stopped) break
                onText(word)
                written++
            }
            return Counts(prompt.length, written, 10, 20, 15)
        }

        override fun stop() {
            stopped = true
        }

        override fun reset() = Unit

        override fun close() {
            closed.incrementAndGet()
        }
    }

    override fun engine(bundle: Bundle, threads: Int): Engine = object : Engine {
        init {
            load()
        }

        override val context = bundle.manifest.context
        override val chunk = bundle.manifest.chunk
        override var position = 0

        override fun prefill(tokens: LongArray) = step(tokens, position.toLong()).also { position += tokens.size }

        override fun step(tokens: LongArray, position: Long): FloatArray {
            failure?.let { throw it }
            return FloatArray(bundle.manifest.model.vocabSize.toInt())
        }

        override fun reset() {
            position = 0
        }

        override fun close() {
            closed.incrementAndGet()
        }
    }
}

/** The application with a [FakeRuntime], and with the bundle of the property `lobit.bundle` installed as `demo`. */
class FakeApplication : DemoApplication() {
    val fake = FakeRuntime()

    override fun onCreate() {
        super.onCreate()
        bundleOf("lobit.bundle").copyRecursively(File(filesDir, "bundles/demo"), overwrite = true)
    }

    override fun runtime(): Runtime = fake

    /** The listeners that the service has made. */
    val listeners = mutableListOf<FakeListener>()

    /** Why there is no listener, where there is none. */
    var taken: String? = null

    override fun listener(name: String): Listener {
        taken?.let { throw IOException(it) }
        return FakeListener(name).also { listeners += it }
    }
}

/** Gives the first [free] bytes of [content] at once, and the rest when [gate] is open. */
class HeldStream(private val content: ByteArray, private val free: Int) : InputStream() {
    val gate = CountDownLatch(1)
    private var done = 0

    override fun read(): Int {
        if (done == free) gate.await()
        return if (done < content.size) content[done++].toInt() and 0xff else -1
    }

    override fun read(into: ByteArray, start: Int, length: Int): Int {
        if (done == free) gate.await()
        val size = minOf(length, (if (done < free) free else content.size) - done)
        content.copyInto(into, start, done, done + size)
        done += size
        return if (size > 0) size else -1
    }
}

fun bundleOf(property: String) = File(System.getProperty(property) ?: throw LobitException("the property $property is not set"))

/** Lets the main thread run until [condition] holds, a minute at most. */
fun await(what: String, condition: () -> Boolean) {
    val end = System.nanoTime() + TimeUnit.SECONDS.toNanos(WAIT)
    while (!condition() && System.nanoTime() < end) {
        shadowOf(Looper.getMainLooper()).idle()
        Thread.sleep(5)
    }
    assertTrue(what, condition())
}

private const val WAIT = 60L

/** The view of an id. */
fun <T : android.view.View> Activity.view(id: Int): T = findViewById(id)
