package dev.lobit.demo.service

import android.content.Intent
import android.net.Credentials
import android.net.LocalServerSocket
import android.net.LocalSocket
import android.os.Build
import android.os.Bundle
import android.system.ErrnoException
import android.system.Os
import android.system.OsConstants
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
    private var server: LocalServerSocket? = null

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
        val name = intent.getStringExtra("bundle").orEmpty()
        val threads = intent.getIntExtra("threads", 0)
        store.close() // a conversation would take memory and time from what is measured
        end()
        try {
            val socket = LocalServerSocket(SOCKET)
            server = socket
            tell(getString(R.string.service_waiting, name))
            thread(name = "service") { accept(socket, name, threads) }
        } catch (error: IOException) {
            tell("the socket cannot be opened: ${error.message}")
        }
    }

    /** Serves one client after the other, until the socket is closed. */
    private fun accept(socket: LocalServerSocket, name: String, threads: Int) {
        while (true) {
            val client = try { socket.accept() } catch (_: IOException) { return }
            client.use { if (isShell(it.peerCredentials)) serve(it, name, threads) }
            tell(getString(R.string.service_waiting, name))
        }
    }

    private fun serve(client: LocalSocket, name: String, threads: Int) = try {
        val bundle = app.library.checked(name)
        val runtime = app.runtime()
        val about = JSONObject().put("device", app.probe.device()).put("app", packageManager.getPackageInfo(packageName, 0).versionName)
            .put("backends", JSONArray(runtime.backends))
        // A benchmark opens an engine of its own: what it measures is then the only one.
        val engine = lazy { runtime.engine(bundle, threads) }
        val bench = Bench(app.probe) { asked -> runtime.engine(bundle, asked) }
        val service = Service(engine, about) { request, progress ->
            bench.run(BenchRequest.of(request)) { row, done, total ->
                tell(getString(R.string.service_running, name, row))
                progress(JSONObject().put("row", row).put("done", done).put("total", total))
            }
        }
        try {
            service.run(client.inputStream, client.outputStream)
        } finally {
            if (engine.isInitialized()) engine.value.close()
        }
    } catch (error: Exception) {
        tell(error.message ?: "$error")
        refuse(client, (error as? LobitException)?.message ?: "$error")
    }

    /** Tells a client why there is no service, where it still listens. */
    private fun refuse(client: LocalSocket, why: String) = try {
        with(Service) { DataOutputStream(client.outputStream).frame(Service.FAILED, why.toByteArray()) }
    } catch (_: IOException) {
        // The client has gone: there is nobody to tell.
    }

    private fun tell(text: String) = runOnUiThread { findViewById<TextView>(R.id.work).setTextOrHide(text) }

    private fun end() {
        val socket = server ?: return
        server = null
        // Closing alone would leave the thread waiting, and the socket's name taken.
        try { Os.shutdown(socket.fileDescriptor, OsConstants.SHUT_RDWR) } catch (_: ErrnoException) { }
        socket.close()
    }

    override fun onDestroy() {
        end()
        super.onDestroy()
    }

    companion object {
        const val SOCKET = "dev.lobit.demo.service"
        private const val ROOT = 0
        private const val SHELL = 2000

        /** Whether a client is adb's shell, or root, as on emulators. */
        fun isShell(client: Credentials): Boolean = client.uid == SHELL || client.uid == ROOT
    }
}
