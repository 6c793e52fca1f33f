package dev.lobit.demo.service

import android.content.Intent
import android.os.Build
import android.os.Bundle
import android.view.WindowManager
import android.widget.TextView
import dev.lobit.core.Bench
import dev.lobit.core.BenchRequest
import dev.lobit.core.LobitException
import dev.lobit.core.Service
import dev.lobit.demo.R
import dev.lobit.demo.Screen
import dev.lobit.demo.State
import dev.lobit.demo.setTextOrHide
import java.io.Closeable
import java.io.DataOutputStream
import java.io.IOException
import kotlin.concurrent.thread
import org.json.JSONArray
import org.json.JSONObject

/**
 * Lets `lobit` on a computer use a bundle, over adb: `am start -n dev.lobit.demo/.service.ServiceActivity --es bundle NAME`,
 * with `--ei threads N` for another number of threads than the bundle says.
 *
 * It opens a bundle in the app's own folder, listens on the abstract socket [SOCKET], and talks to the shell's user (adb) alone: no other
 * app and nothing outside of this phone can use it. The screen stays on meanwhile; leaving it ends the service.
 */
class ServiceActivity : Screen() {
    private var serving: Serving? = null

    override fun onCreate(state: Bundle?) {
        super.onCreate(state)
        setContentView(R.layout.service)
        window.addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON)
        if (Build.VERSION.SDK_INT >= 27) {
            // Android freezes an app that is not seen, also behind a locked screen.
            setShowWhenLocked(true)
            setTurnScreenOn(true)
        }
        begin(intent)
    }

    override fun onNewIntent(intent: Intent) {
        super.onNewIntent(intent)
        begin(intent)
    }

    override fun show(state: State) {
        findViewById<TextView>(R.id.problem).setTextOrHide(state.problem)
    }

    private fun begin(intent: Intent) {
        // A conversation or a benchmark would take memory and time from what is measured.
        store.cancelBench()
        store.close()
        end()
        val work = findViewById<TextView>(R.id.work)
        try {
            serving = Serving(app.listener(SOCKET), intent.getStringExtra("bundle").orEmpty(), intent.getIntExtra("threads", 0))
        } catch (error: IOException) {
            work.setTextOrHide("the socket cannot be opened: ${error.message}")
        }
    }

    private fun end() {
        serving?.close()
        serving = null
    }

    override fun onDestroy() {
        end()
        super.onDestroy()
    }

    /** Serves one client after the other with a bundle, on a thread of its own, until it is closed. */
    private inner class Serving(private val listener: Listener, private val name: String, private val threads: Int) : Closeable {
        @Volatile private var client: Client? = null

        @Volatile private var isClosed = false

        init {
            tell(getString(R.string.service_waiting, name))
            thread(name = "service") { accept() }
        }

        private fun accept() {
            while (!isClosed) {
                val next = try { listener.accept() } catch (_: IOException) { return }
                client = next
                next.use { if (!isClosed && isAllowed(it)) serve(it) }
                tell(getString(R.string.service_waiting, name))
            }
        }

        private fun isAllowed(client: Client) = try { isShell(client.uid) } catch (_: IOException) { false }

        private fun serve(client: Client) = try {
            val bundle = app.library.checked(name)
            val runtime = app.runtime()
            val about = JSONObject().put("device", app.probe.device()).put("backends", JSONArray(runtime.backends))
                .put("app", packageManager.getPackageInfo(packageName, 0).versionName)
            // A benchmark opens an engine of its own: what it measures is then the only one.
            val engine = lazy { runtime.engine(bundle, threads) }
            val bench = Bench(app.probe, check = ::check) { asked -> runtime.engine(bundle, asked) }
            val service = Service(engine, about) { request, progress ->
                bench.run(BenchRequest.of(request)) { row, done, total ->
                    tell(getString(R.string.service_running, name, row))
                    progress(JSONObject().put("row", row).put("done", done).put("total", total))
                }
            }
            try {
                service.run(client.input, client.output)
            } finally {
                if (engine.isInitialized()) engine.value.close()
            }
        } catch (error: Exception) {
            tell(error.message ?: "$error")
            refuse(client, (error as? LobitException)?.message ?: "$error")
        }

        private fun check() {
            if (isClosed) throw LobitException(getString(R.string.service_ended, name))
        }

        /** Tells a client why there is no service, where it still listens. */
        private fun refuse(client: Client, why: String) = try {
            with(Service) { DataOutputStream(client.output).frame(Service.FAILED, why.toByteArray()) }
        } catch (_: IOException) {
            // The client has gone: there is nobody to tell.
        }

        private fun tell(text: String) = runOnUiThread { if (!isClosed) findViewById<TextView>(R.id.work).setTextOrHide(text) }

        override fun close() {
            isClosed = true
            listener.close()
            client?.close()
        }
    }

    companion object {
        const val SOCKET = "dev.lobit.demo.service"
        private const val ROOT = 0
        private const val SHELL = 2000

        /** Whether a client's user is adb's shell, or root, as on emulators. */
        fun isShell(uid: Int): Boolean = uid == SHELL || uid == ROOT
    }
}
