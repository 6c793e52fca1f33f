package dev.lobit.demo

import android.app.Application
import android.os.Handler
import android.os.Looper
import dev.lobit.core.ExecuTorch
import dev.lobit.core.LobitException
import dev.lobit.core.Runtime
import dev.lobit.core.Supported
import dev.lobit.demo.service.Listener
import dev.lobit.demo.service.LocalListener
import java.io.File
import java.util.concurrent.Executors
import org.pytorch.executorch.NativeLibraries

/** The process: it has the one [Store]. Tests give it another runtime, and other sockets. */
open class DemoApplication : Application() {
    private val handler by lazy { Handler(Looper.getMainLooper()) }
    val library by lazy { Library(File(filesDir, "bundles"), assets, Supported(backends = { runtime().backends })) }
    val probe by lazy { PhoneProbe(this) }
    val store by lazy {
        val worker = Executors.newSingleThreadExecutor { Thread(it, "model") }
        Store(::runtime, library, probe, ResourceTexts(this), worker) { handler.post(it) }
    }

    /** The runtime, its libraries loaded. Throws [LobitException] where this processor cannot run it. */
    open fun runtime(): Runtime {
        cpuProblem(File("/proc/cpuinfo"))?.let { throw LobitException(getString(it)) }
        NativeLibraries.load()
        return ExecuTorch(File(cacheDir, "runtime"))
    }

    /** Where the service waits for clients. Throws `IOException` where the name is taken. */
    open fun listener(name: String): Listener = LocalListener(name)
}

/** The sentences that the [Store] shows. */
private class ResourceTexts(private val app: Application) : Store.Texts {
    override fun copying() = app.getString(R.string.copying)

    override fun checking(name: String) = app.getString(R.string.checking, name)

    override fun loading(name: String) = app.getString(R.string.loading, name)

    override fun measuring(row: String, done: Int, all: Int) = app.getString(R.string.bench_row, row, minOf(done, all), all)
}

/** The sentence to show where an ARM processor lacks what the library needs, as its code would end the process; null where it has it. */
fun cpuProblem(cpuinfo: File): Int? {
    val features = try { cpuinfo.readLines().filter { it.startsWith("Features") } } catch (_: java.io.IOException) { emptyList() }
    return if (features.isEmpty() || features.all { " atomics" in it }) null else R.string.cpu_too_old
}
